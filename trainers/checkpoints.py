"""Checkpoints that are complete or not there, say which version wrote them, and are not read when they are damaged."""

import json
import os
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib.metadata import version

import torch
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from torch import nn

from nnunet_deform import __version__

_RECORD = "nnunet_deform.json"


class AtomicCheckpoints(nnUNetTrainer):
    """Checkpoints appear under their name only when they are complete, so a kill never leaves a broken one."""

    def save_checkpoint(self, filename: str) -> None:
        """Save to a file beside it first.

        Raises:
            OSError: the disk is full or not writable; what was under the name before is still there.
        """
        if self.local_rank != 0 or self.disable_checkpointing:
            super().save_checkpoint(filename)
            return
        partial = f"{filename}.partial"
        try:
            super().save_checkpoint(partial)
            _record_versions(partial)
            os.replace(partial, filename)
        except (OSError, RuntimeError) as error:  # torch's writer raises RuntimeError when a disk is full
            raise OSError(
                f"cannot write the checkpoint {filename} ({error}); is the disk full? Make room and run the same "
                "command with --c: earlier checkpoints are untouched."
            ) from error
        finally:
            with suppress(FileNotFoundError):
                os.remove(partial)

    def load_checkpoint(
        self, checkpoint: str | dict | None = None, *, filename_or_checkpoint: str | dict | None = None
    ) -> None:
        """nnU-Net's, with a clear word on a damaged file and a note on one that another version wrote.

        Args:
            checkpoint: a file's name, or what was read from one.
            filename_or_checkpoint: the same, as nnU-Net 2.8.1 calls it.

        Raises:
            RuntimeError: the file is no complete checkpoint.
        """
        if checkpoint is None:
            checkpoint = filename_or_checkpoint
        if isinstance(checkpoint, str):
            trained_with = checkpoint_versions(checkpoint).get("nnunet-deform", __version__)
            _check_complete(checkpoint)
            if trained_with != __version__:
                self.print_to_log_file(
                    f"WARNING: {checkpoint} was written by nnunet-deform {trained_with}, this is "
                    f"{__version__}; the changelog says whether networks or recipes have changed."
                )
        if not self.was_initialized:
            self.initialize()
        with _one_state_dict(self.network):
            super().load_checkpoint(checkpoint)


@contextmanager
def _one_state_dict(network: nn.Module) -> Iterator[None]:
    """nnU-Net makes one for each weight that it loads: ten seconds and more where there are a thousand."""
    state = network.state_dict()
    # Past a compiled network's __setattr__, which hands on to what was compiled.
    vars(network)["state_dict"] = lambda: state
    try:
        yield
    finally:
        del vars(network)["state_dict"]


def _record_versions(path: str) -> None:
    """Add the versions to the archive that torch.save has written, where they can be read without unpickling it."""
    versions = {"nnunet-deform": __version__, "nnunetv2": version("nnunetv2"), "torch": torch.__version__}
    with zipfile.ZipFile(path, "a") as archive:
        root = archive.namelist()[0].partition("/")[0]
        # A fixed date: equal weights give equal files.
        archive.writestr(zipfile.ZipInfo(f"{root}/{_RECORD}"), json.dumps(versions))


def checkpoint_versions(path: str) -> dict[str, str]:
    """The versions of packages that wrote a checkpoint; empty when it is not one of ours or older than this record.

    Raises:
        RuntimeError: the file is damaged.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            records = [name for name in archive.namelist() if name.endswith(f"/{_RECORD}")]
            return json.loads(archive.read(records[0])) if records else {}
    except zipfile.BadZipFile as error:
        raise _damaged(path, str(error)) from error


def _check_complete(path: str) -> None:
    # torch checks no sums: it would load weights from damaged bytes.
    with zipfile.ZipFile(path) as archive:
        damaged = archive.testzip()
    if damaged is not None:
        raise _damaged(path, f"wrong checksum of {damaged}")


def _damaged(path: str, reason: str) -> RuntimeError:
    return RuntimeError(
        f"the checkpoint {path} is damaged ({reason}), perhaps by an incomplete copy or a full disk. Move it away and "
        "run the same command again: with --c, nnU-Net takes checkpoint_final, else checkpoint_latest, else "
        "checkpoint_best, and starts anew when there is none."
    )
