"""An end-to-end run on made-up data: ``run_demo`` calls the stock nnU-Net commands on a phantom it writes itself."""

from nnunet_deform.demo.phantom import write_phantom_dataset
from nnunet_deform.demo.run import DemoError, DemoResult, run_demo

__all__ = ["DemoError", "DemoResult", "run_demo", "write_phantom_dataset"]
