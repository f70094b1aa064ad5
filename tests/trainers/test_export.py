"""The exported file beside the network it comes from."""

import json

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from nnunet_deform import cli
from nnunet_deform.deployment import export
from nnunet_deform.trainers.variants import find_trainer

onnxruntime = pytest.importorskip("onnxruntime", reason="needs the extra 'export'")

pytestmark = pytest.mark.usefixtures("narrow")
PLANS = {
    "3d": {"patch_size": (8, 16, 12), "strides": ((1, 1, 1), (2, 2, 2), (2, 2, 2))},
    "2d": {"patch_size": (16, 24), "strides": ((1, 1), (2, 2), (2, 2))},
    # Exporting takes longer with each level, and MAGIC's first is static.
    "2d, two levels": {"patch_size": (16, 24), "strides": ((1, 1), (2, 2))},
}


def run(*arguments: object):
    return CliRunner().invoke(cli.app, ["export", *map(str, arguments)])


@pytest.mark.parametrize(
    ("network", "plan"),
    [
        pytest.param("LightMedSeg", "3d", marks=pytest.mark.slow),
        ("LightMedSeg", "2d, two levels"),
        pytest.param("DeformUX", "3d", marks=pytest.mark.slow),
        ("DeformUX", "2d, two levels"),
        pytest.param("MAGIC", "3d", marks=pytest.mark.slow),
        ("MAGIC", "2d"),
        # Of MAGIC's class, with layers like its own or with the operator of DeformUX-Net.
        *(
            pytest.param(network, plan, marks=pytest.mark.slow)
            for network in ("ODConv", "DCD", "DDConv")
            for plan in ("3d", "2d")
        ),
    ],
)
def test_onnx_runtime_gives_the_networks_logits(make_trainer, tmp_path, network, plan):
    name, plan = f"nnUNetTrainer{network}_1epochs1iters", PLANS[plan]
    trainer = make_trainer(find_trainer(name), **plan)
    trainer.run_training()
    output = tmp_path / "models" / "model.onnx"
    result = run("-m", trainer.output_folder_base, "-o", output)
    assert result.exit_code == 0, result.output
    assert [path.name for path in output.parent.iterdir()] == ["model.onnx"]

    session = onnxruntime.InferenceSession(str(output), providers=["CPUExecutionProvider"])
    image = torch.randn(1, 1, *plan["patch_size"])
    (logits,) = session.run(["logits"], {"image": image.numpy()})
    trainer.set_deep_supervision_enabled(False)
    trainer.network.eval()
    with torch.no_grad():
        np.testing.assert_allclose(logits, trainer.network(image).numpy(), atol=2e-5)

    metadata = {name: json.loads(value) for name, value in session.get_modelmeta().custom_metadata_map.items()}
    assert metadata["patch_size"] == list(plan["patch_size"])
    assert metadata["spacing"] == [1.0] * len(plan["patch_size"])
    assert metadata["normalization_schemes"] == ["ZScoreNormalization"]
    assert metadata["labels"] == {"background": 0, "bright": 1, "dark": 2}
    assert metadata["trainer"] == name
    assert metadata["activation"] == "softmax"
    assert metadata["mirror_axes"] == list(trainer.inference_allowed_mirroring_axes)
    assert metadata["foreground_intensity_properties_per_channel"]["0"]["percentile_99_5"] == 2.0


def test_a_folder_without_a_model_is_named(tmp_path):
    result = run("-m", tmp_path / "nowhere", "-o", tmp_path / "model.onnx")
    assert result.exit_code == 1
    assert f"{tmp_path}/nowhere/plans.json does not exist" in result.stderr


def test_a_missing_package_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "onnxscript", None)
    result = run("-m", tmp_path, "-o", tmp_path / "model.onnx")
    assert result.exit_code == 1
    assert "onnxscript is not installed; run: pip install 'nnunet-deform[export]'" in result.stderr


def test_a_wrong_file_is_not_left_behind(tmp_path):
    """The check that stands between the exporter and the file."""
    network = torch.nn.Conv2d(1, 2, 1)
    image = torch.randn(1, 1, 4, 4)
    program = torch.onnx.export(network, (image,), dynamo=True, input_names=["image"], verbose=False)
    program.save(tmp_path / "model.onnx")
    with torch.no_grad():
        export._check_result(tmp_path / "model.onnx", image, network(image))
        with pytest.raises(export.ExportError, match="differ by"):
            export._check_result(tmp_path / "model.onnx", image, network(image) + 0.1)
