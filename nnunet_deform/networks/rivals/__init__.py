"""The networks that the papers compare with and no maintained library has, one in a file, for any plan."""

from nnunet_deform.networks.rivals.cotr import CoTr
from nnunet_deform.networks.rivals.nnformer import NnFormer
from nnunet_deform.networks.rivals.segformer3d import SegFormer3D
from nnunet_deform.networks.rivals.transbts import TransBTS
from nnunet_deform.networks.rivals.unest import UNesT
from nnunet_deform.networks.rivals.unetrpp import UNETRPlusPlus

RIVALS = {
    "NnFormer": NnFormer,
    "UNETRPlusPlus": UNETRPlusPlus,
    "SegFormer3D": SegFormer3D,
    "UNesT": UNesT,
    "TransBTS": TransBTS,
    "CoTr": CoTr,
}

__all__ = ["RIVALS", "CoTr", "NnFormer", "SegFormer3D", "TransBTS", "UNETRPlusPlus", "UNesT"]
