"""Checkpoints are atomic, and a bad one gives one clear line and runs nothing."""

import errno
import math
import os
import pickle
import resource
import signal
import zipfile

import pytest
import torch

from hierarchical_diffusion_rlhf_caption_refinement.utils import checkpoint
from hierarchical_diffusion_rlhf_caption_refinement.utils.checkpoint import CheckpointError, load, save


def payload():
    model = torch.nn.Linear(64, 64)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(1, 64)).sum().backward()
    optimizer.step()
    plain = {"text": "a dog", "numbers": [1, 2.5, math.inf, None, True], "nested": {"x": (1, 2)}}
    return {"model": model.state_dict(), "optimizer": optimizer.state_dict(), **plain}


class Evil:
    def __init__(self, victim):
        self.victim = victim

    def __reduce__(self):
        return os.system, (f"touch {self.victim}",)


def failure(path, kind="base"):
    with pytest.raises(CheckpointError) as caught:
        load(path, kind)
    message = str(caught.value)
    assert message.startswith(f"{path}: ") and "\n" not in message
    return message.removeprefix(f"{path}: ")


def test_round_trip(tmp_path):
    saved = payload()
    save(tmp_path / "new" / "folder" / "a.pt", "base", saved)
    loaded = load(tmp_path / "new" / "folder" / "a.pt", "base")
    for part in ("model", "optimizer"):
        torch.testing.assert_close(loaded.pop(part), saved.pop(part), rtol=0, atol=0)
    assert loaded == saved
    assert os.listdir(tmp_path / "new" / "folder") == ["a.pt"]


def test_a_part_that_is_missing_is_named(tmp_path):
    save(tmp_path / "a.pt", "base", {"model": 1})
    loaded = load(tmp_path / "a.pt", "base")
    with pytest.raises(CheckpointError) as caught:
        loaded["config"]
    assert str(caught.value) == f"{tmp_path / 'a.pt'}: damaged or made by another version: it has no 'config'"
    torch.save({"format": 1, "kind": "base", "payload": None}, tmp_path / "a.pt")
    assert failure(tmp_path / "a.pt") == "not a checkpoint of this project"


def test_missing_folder_and_empty(tmp_path):
    (tmp_path / "empty.pt").touch()
    assert failure(tmp_path / "nothing.pt") == "No such file or directory"
    assert failure(tmp_path) == "is a folder; expected a file such as best_rlhf_model.pt in it"
    assert failure(tmp_path / "empty.pt") == "empty file"


def test_wrong_kind_and_newer_format(tmp_path, monkeypatch):
    save(tmp_path / "a.pt", "reward", {})
    assert failure(tmp_path / "a.pt") == "is a reward checkpoint, expected base"
    monkeypatch.setattr(checkpoint, "FORMAT", 7)
    save(tmp_path / "a.pt", "base", {})
    monkeypatch.undo()
    assert failure(tmp_path / "a.pt") == "has format 7, this version reads up to 1; update the package"


@pytest.mark.parametrize("share", [0.0002, 0.001, 0.3, 0.7, 0.999])
def test_truncated(tmp_path, share):
    save(tmp_path / "a.pt", "base", payload())
    whole = (tmp_path / "a.pt").read_bytes()
    (tmp_path / "a.pt").write_bytes(whole[: int(share * len(whole))])
    assert failure(tmp_path / "a.pt") == "damaged or cut short"


def test_a_flipped_bit_is_noticed(tmp_path):
    save(tmp_path / "a.pt", "base", {"weight": torch.zeros(10_000)})
    data = bytearray((tmp_path / "a.pt").read_bytes())
    data[len(data) // 2] ^= 1
    (tmp_path / "a.pt").write_bytes(data)
    assert failure(tmp_path / "a.pt") == "damaged or cut short"


def test_other_files(tmp_path):
    (tmp_path / "a.txt").write_text("hello")
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("a", "b")
    torch.save({"state_dict": torch.zeros(2)}, tmp_path / "other.pt")
    assert failure(tmp_path / "a.txt") == failure(tmp_path / "a.zip") == "not a checkpoint"
    assert failure(tmp_path / "other.pt") == "not a checkpoint of this project"


@pytest.mark.parametrize("write", [torch.save, lambda x, p: p.write_bytes(pickle.dumps(x)), lambda x, p: p.write_bytes(pickle.dumps(x, 2))])
def test_pickled_objects_are_refused_and_nothing_runs(tmp_path, write):
    write({"format": 1, "kind": "base", "payload": Evil(tmp_path / "harmed")}, tmp_path / "evil.pt")
    assert failure(tmp_path / "evil.pt").startswith("refused: it holds Python objects")
    assert not (tmp_path / "harmed").exists()


def full_disk(*args, **kwargs):
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize(("module", "name"), [(torch, "save"), (os, "replace"), (os, "fsync")])
def test_full_disk_keeps_the_old_file(tmp_path, monkeypatch, module, name):
    save(tmp_path / "a.pt", "base", {"step": 1})
    monkeypatch.setattr(module, name, full_disk)
    with pytest.raises(CheckpointError) as caught:
        save(tmp_path / "a.pt", "base", {"step": 2})
    monkeypatch.undo()
    assert str(caught.value) == f"{tmp_path / 'a.pt'}: cannot be written: No space left on device"
    assert load(tmp_path / "a.pt", "base") == {"step": 1}
    assert os.listdir(tmp_path) == ["a.pt"]


def test_a_write_that_really_fails_keeps_the_old_file(tmp_path):
    save(tmp_path / "a.pt", "base", {"step": 1})
    limits, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (5_000, limits[1]))
    try:
        with pytest.raises(CheckpointError, match="cannot be written: File too large"):
            save(tmp_path / "a.pt", "base", {"weight": torch.zeros(100_000)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert load(tmp_path / "a.pt", "base") == {"step": 1}
    assert os.listdir(tmp_path) == ["a.pt"]


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "models").touch()
    with pytest.raises(CheckpointError, match="cannot be written: "):
        save(tmp_path / "models" / "a.pt", "base", {})


def test_unsaveable_payload_is_the_caller_s_error_and_leaves_nothing(tmp_path):
    with pytest.raises((AttributeError, pickle.PicklingError)):
        save(tmp_path / "a.pt", "base", {"f": lambda: 0})
    assert os.listdir(tmp_path) == []


def test_the_digest_is_of_the_weights_alone(tmp_path):
    path, found = tmp_path / "a.pt", []
    for weight, seconds in ((1.0, 3), (1.0, 4), (2.0, 4)):
        checkpoint.save(path, "base", {"model": {"w": torch.full((2,), weight)}, "facts": {"seconds": seconds}})
        found.append(checkpoint.weights_digest(path))
    assert found[0] == found[1] != found[2]
