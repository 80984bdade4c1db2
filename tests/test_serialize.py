"""save and load: what comes back, what survives a failed save, and what is refused (errors name the file)."""

from __future__ import annotations

import errno
import json
import os

import pytest
import torch
from safetensors.torch import load_file, save_file

from fastsae import atomic as files
from fastsae.model.files import SavedModuleError, load, save
from tests.dense_sae import sae_for_test, tokens


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"tied": True, "normalize": "constant", "aux_k": 5, "aux_coef": 0.1, "dead_after": 77, "loss": "fvu"},
        {"d_out": 7, "pre_bias": False, "decoder_norm": "free", "normalize": "layer_norm"},
    ],
)
def test_a_saved_module_comes_back_whole(tmp_path, settings, dtype):
    sae = sae_for_test(dtype=dtype, **settings)
    sae.tokens_since_fired[3] = 5
    assert save(sae, tmp_path / "new" / "dir") == tmp_path / "new" / "dir"
    again = load(tmp_path / "new" / "dir")
    assert again.config == sae.config
    assert again.state_dict().keys() == sae.state_dict().keys()
    for name, value in sae.state_dict().items():
        assert torch.equal(again.state_dict()[name], value), name
        assert again.state_dict()[name].dtype == value.dtype
    assert all(p.requires_grad and p.is_leaf for p in again.parameters())
    y = tokens(8, sae.d_out, 4) if sae.d_out != sae.d_in else None
    assert torch.equal(again(tokens(8, 10), target=y).loss, sae(tokens(8, 10), target=y).loss)


def test_the_files_are_open_formats_with_ordinary_permissions(tmp_path):
    sae = sae_for_test()
    save(sae, tmp_path)
    assert sorted(os.listdir(tmp_path)) == ["config.json", "sae.safetensors"]
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["architecture"] == "fastsae.SparseAutoencoder"
    assert config["activation"] == {"kind": "topk", "k": 4, "weighted": False}
    assert config["dtype"] == "float64"
    assert torch.equal(load_file(tmp_path / "sae.safetensors")["W_enc"], sae.W_enc)
    (tmp_path / "plain").touch()
    for name in ("config.json", "sae.safetensors"):
        assert (tmp_path / name).stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_config_json_can_be_lost(tmp_path):
    save(sae_for_test(), tmp_path)
    (tmp_path / "config.json").unlink()
    assert torch.equal(load(tmp_path).W_enc, sae_for_test().W_enc)


@pytest.mark.parametrize("failing", ["sae.safetensors", "config.json"])
def test_a_full_disk_leaves_the_old_files(tmp_path, monkeypatch, failing):
    old = sae_for_test(seed=1)
    save(old, tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    real = files.fsync_path

    def full(path):
        if failing in path.name:
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        real(path)

    monkeypatch.setattr(files, "fsync_path", full)
    with pytest.raises(SavedModuleError, match=rf"cannot write .*{failing}: .*No space left"):
        save(sae_for_test(seed=2), tmp_path)
    after = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert after.keys() == before.keys(), "a temporary file was left behind"
    assert after[failing] == before[failing]
    # The weights go first, so either save is loadable: the old one, or the new one with the same configuration.
    assert load(tmp_path).config == old.config


def test_a_file_in_the_place_of_the_folder_is_refused(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(SavedModuleError, match=r"file is a file, expected a folder"):
        save(sae_for_test(), tmp_path / "file")
    assert (tmp_path / "file").read_text() == "in the way"


def rewrite(tmp_path, header=True, drop=(), **changes):
    """Rewrites sae.safetensors with tensors changed or dropped."""
    path = tmp_path / "sae.safetensors"
    tensors = {name: t for name, t in load_file(path).items() if name not in drop} | changes
    metadata = {"fastsae": json.dumps(json.loads((tmp_path / "config.json").read_text()))} if header else None
    save_file(tensors, path, metadata=metadata)


def reconfigure(tmp_path, drop=(), **changes):
    path = tmp_path / "config.json"
    config = {name: value for name, value in json.loads(path.read_text()).items() if name not in drop} | changes
    path.write_text(json.dumps(config))


BROKEN = {
    "no weights": (lambda d: (d / "sae.safetensors").unlink(), r"sae\.safetensors is not there"),
    "half a file": (lambda d: os.truncate(d / "sae.safetensors", 2000), r"sae\.safetensors is truncated"),
    "no header": (lambda d: os.truncate(d / "sae.safetensors", 5), r"sae\.safetensors is truncated"),
    "an empty file": (lambda d: os.truncate(d / "sae.safetensors", 0), r"sae\.safetensors is truncated"),
    "a pickle": (lambda d: torch.save({"W_enc": torch.zeros(2)}, d / "sae.safetensors"), "no safetensors file"),
    "no JSON": (lambda d: (d / "config.json").write_text('{"architecture": '), r"config\.json is damaged"),
    "a list": (lambda d: (d / "config.json").write_text("[1]"), r"config\.json has architecture \[1\]"),
    "another architecture": (
        lambda d: reconfigure(d, architecture="sae_lens.TopK"),
        r"config\.json has architecture 'sae_lens.TopK', expected 'fastsae",
    ),
    "another version": (lambda d: reconfigure(d, version=2), r"config\.json has version 2, expected 1"),
    "two saves": (lambda d: reconfigure(d, loss="fvu"), "different saves: they differ in loss.*delete config.json"),
    "a missing tensor": (lambda d: rewrite(d, drop=["b_enc"]), r"sae\.safetensors lacks b_enc; expected W_dec, W_enc"),
    "a strange tensor": (lambda d: rewrite(d, extra=torch.zeros(2)), r"sae\.safetensors also holds extra"),
    "another shape": (
        lambda d: rewrite(d, W_enc=torch.zeros(30, 11, dtype=torch.float64)),
        r"sae\.safetensors: W_enc is torch.float64 \(30, 11\), its configuration says torch.float64 \(30, 10\)",
    ),
    "another dtype": (lambda d: rewrite(d, b_dec=torch.zeros(10)), r"b_dec is torch.float32 \(10,\)"),
}

UNBELIEVABLE = {
    "k": ({"activation": {"kind": "topk", "k": 31}}, "k = 31, expected at most"),
    "unknown rule": ({"activation": {"kind": "magic"}}, "activation is"),
    "unknown setting": ({"colour": "blue"}, "colour"),
    "text": ({"d_sae": "30"}, "d_sae is '30'"),
    "dtype": ({"dtype": "load"}, "dtype is 'load'"),
    "claims a petabyte": ({"d_sae": 10**10}, r"sae\.safetensors: .* its configuration says"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_save_is_refused_by_name(tmp_path, case):
    save(sae_for_test(), tmp_path)
    break_it, message = BROKEN[case]
    break_it(tmp_path)
    with pytest.raises(SavedModuleError, match=message):
        load(tmp_path)


@pytest.mark.parametrize("case", UNBELIEVABLE)
def test_invalid_settings_are_refused(tmp_path, case):
    save(sae_for_test(), tmp_path)
    changes, message = UNBELIEVABLE[case]
    reconfigure(tmp_path, **changes)
    rewrite(tmp_path)
    with pytest.raises(SavedModuleError, match=message):
        load(tmp_path)


def test_missing_settings_are_refused(tmp_path):
    save(sae_for_test(), tmp_path)
    reconfigure(tmp_path, drop=["d_in"])
    rewrite(tmp_path)
    with pytest.raises(SavedModuleError, match=r"config\.json does not describe an SAE: .*d_in"):
        load(tmp_path)
    (tmp_path / "config.json").unlink()
    with pytest.raises(SavedModuleError, match="does not describe an SAE"):
        load(tmp_path)
