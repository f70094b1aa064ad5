"""The networks that the papers compare with, for any plan, with nnU-Net's recipe."""

from nnunet_deform.networks.rivals.geometry import Sizes, token_grids, total_stride
from nnunet_deform.plans.rivals import rival_architecture
from nnunet_deform.trainers.base import OutputStridesTrainer


class RivalTrainer(OutputStridesTrainer):
    """One of the networks of :mod:`nnunet_deform.networks.rivals`, with nnU-Net's recipe, by ``network_options``."""

    architecture = staticmethod(rival_architecture)

    def _report_memory(self) -> None:
        self.print_to_log_file("The memory of this network is not estimated.")
        arguments = self.planned_architecture(self.configuration_manager)["arch_kwargs"]
        if "strides" in arguments:
            strides = arguments["strides"]
        else:
            strides = [total_stride(arguments["embed_strides"]), *arguments["down_strides"]]
        patch = list(self.configuration_manager.patch_size)
        windows = f", windows of {_sizes(arguments['window_sizes'])}" if "window_sizes" in arguments else ""
        self.print_to_log_file(
            f"For the patch {patch} the network's maps have sizes {_sizes(token_grids(patch, strides))}{windows}."
        )


def _sizes(sizes: Sizes) -> str:
    return ", ".join("x".join(map(str, size)) for size in sizes)


class nnUNetTrainerNnFormer(RivalTrainer):
    """nnFormer of width 192, as in its tables."""

    network_options = {"network": "NnFormer"}


class nnUNetTrainerNnFormer_96(RivalTrainer):
    """nnFormer of width 96, as released for BraTS and ACDC."""

    network_options = {"network": "NnFormer_96"}


class nnUNetTrainerUNETRPP(RivalTrainer):
    """UNETR++ with the block released for Synapse."""

    network_options = {"network": "UNETRPlusPlus"}


class nnUNetTrainerSegFormer3D(RivalTrainer):
    """SegFormer3D as released, without deep supervision."""

    network_options = {"network": "SegFormer3D"}


class nnUNetTrainerUNesT_B(RivalTrainer):
    """UNesT-B, without deep supervision."""

    network_options = {"network": "UNesT_B"}


class nnUNetTrainerUNesT_L(RivalTrainer):
    """UNesT-L, without deep supervision."""

    network_options = {"network": "UNesT_L"}


class nnUNetTrainerTransBTS(RivalTrainer):
    """TransBTS, without deep supervision."""

    network_options = {"network": "TransBTS"}


class nnUNetTrainerCoTr(RivalTrainer):
    """CoTr, for plans of at least four poolings."""

    network_options = {"network": "CoTr"}
