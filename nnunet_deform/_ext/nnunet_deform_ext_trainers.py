"""The one module nnU-Net finds through ``nnUNet_extTrainer``: it hands out trainers from the installed package.

Trainers must live in an importable package. nnU-Net imports what it scans under top-level names and forgets the modules
afterwards, so classes defined here could not be pickled and would be new objects at every look-up.
"""


def __getattr__(name: str) -> type:
    if not name.startswith("nnUNetTrainer"):
        raise AttributeError(name)
    from nnunet_deform.trainers.variants import find_trainer

    return find_trainer(name)
