from nnunet_deform.comparison.curves import read_curve


def test_learning_curves_are_read_from_logs_of_several_runs(tmp_path):
    lines = (
        "2026-01-01 00:00:00.1: Epoch {} \n2026-01-01 00:00:00.2: train_loss {} \n2026-01-01 00:00:00.3: val_loss {} \n"
    )
    (tmp_path / "training_log_2026_1_1_01.txt").write_text(lines.format(0, -0.1, 0.5) + lines.format(1, -0.2, 0.4))
    # killed in epoch 1 and continued there
    (tmp_path / "training_log_2026_1_1_02.txt").write_text(
        lines.format(1, -0.3, 0.3) + lines.format(2, -0.4, 0.2) + "2026-01-01 00:00:00.1: Epoch 3 \n"
    )
    assert read_curve(tmp_path) == ([0, 1, 2], [-0.1, -0.3, -0.4], [0.5, 0.3, 0.2])
