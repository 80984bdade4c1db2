"""openai/sparse_autoencoder: a state dict in a torch file, with the activation's name and settings in it.

encoder.weight (d_sae, d_in), decoder.weight (d_in, d_sae); inputs are standardized where the activation is TopK.
"""

from __future__ import annotations

from fastsae.interop.base import Format, says_its_rule
from fastsae.interop.files import Checkpoint, take
from fastsae.interop.parts import Parts, relu
from fastsae.model.files import SavedModuleError
from fastsae.model.rules import Activation, TopK
from fastsae.warn import warn

LAYOUT = {"pre_bias": "d_in", "latent_bias": "d_sae", "encoder.weight": "d_sae d_in"}
DECODERS = {"decoder.weight": "d_in d_sae", "decoder.linear.weight": "d_sae d_in"}
"""The second is a tied one: the encoder's own tensor under another name."""
STATISTICS = ("stats_last_nonzero", "latents_activation_frequency", "latents_mean_square")


def _file(files: Checkpoint) -> str | None:
    for name in files.weights():
        # A named file is read; in a folder, the only torch file.
        alone = len([other for other in files.weights() if other.endswith(".pt")]) == 1
        if name.endswith(".pt") and name != "ae.pt" and alone and LAYOUT.keys() <= files.names(name):
            return name
    return None


def read(files: Checkpoint, rule: Activation | None) -> Parts:
    name = _file(files)
    if name is None:
        raise SavedModuleError(f"{files.label} has no torch file with {', '.join(LAYOUT)}")
    says_its_rule(files.label, rule)
    path, tensors = files.path(name), files.tensors(name)
    kind, given = tensors.pop("activation", None), tensors.pop("activation_state_dict", {})
    if kind is None:
        if given:
            raise SavedModuleError(f"{path} has an activation_state_dict, but lacks activation, the name that it is of")
        warn(f"{path} lacks activation: it is read as ReLU, as openai's own loader does", UserWarning)
        kind = "ReLU"
    for statistic in STATISTICS:
        tensors.pop(statistic, None)
    tied = "decoder.linear.weight" in tensors
    decoder = "decoder.linear.weight" if tied else "decoder.weight"
    held = take(path, tensors, {**LAYOUT, decoder: DECODERS[decoder]})
    W_dec = held[decoder] if tied else held[decoder].mT
    parts = Parts(relu(), held["encoder.weight"], W_dec, held["latent_bias"], held["pre_bias"], True)
    parts.settings["tied"] = tied
    if kind == "TopK":
        k, then = given.get("k"), given.get("postact_fn", "ReLU")
        if isinstance(k, bool) or not isinstance(k, int) or then != "ReLU":
            raise SavedModuleError(
                f"{path} has TopK with k = {k!r} and postact_fn = {then!r}, expected a number and ReLU"
            )
        parts.rule = TopK(k)
        parts.settings["normalize"] = "standardize"
    elif kind != "ReLU":
        raise SavedModuleError(f"{path} has the activation {kind!r}, expected TopK or ReLU")
    return parts


FORMAT = Format("openai", _file, read, bare=True)
