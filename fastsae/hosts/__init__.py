"""An SAE of fastsae with the interfaces of other libraries: dense acts in and out, under their names.

    saelens.py        a class for SAELens: HookedSAETransformer, its dashboard and exporters
    saebench.py       a module for SAEBench's evaluations
    signs.py          for both: an SAE whose acts have either sign as one whose acts are never negative

These libraries are imported when one of the functions is called, and never by `import fastsae`.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from fastsae.hosts.signs import say_signs, split_signs
from fastsae.model.norm import PER_TOKEN
from fastsae.model.sae import SparseAutoencoder, as_sae

if TYPE_CHECKING:
    from fastsae.hosts.saebench import SAEBenchModule
    from fastsae.hosts.saelens import FastSAE


def register_saelens() -> type[FastSAE]:
    """Makes SAELens load SAEs of the architecture "fastsae", and returns their class. Calling it again is fine.

    Raises ImportError without SAELens.
    """
    registry = _imported("sae_lens.registry", "SAELens", "sae-lens")
    from fastsae.hosts.saelens import FastSAE, FastSAEConfig

    if "fastsae" not in registry.SAE_CLASS_REGISTRY:
        registry.register_sae_class("fastsae", FastSAE, FastSAEConfig)
    return FastSAE


def as_saelens(sae: SparseAutoencoder, **metadata: Any) -> FastSAE:
    """`sae` as an SAE of SAELens, which shares its parameters: for HookedSAETransformer, dashboards and exporters.

    metadata: what SAELens needs to know about its use, such as model_name="gpt2", hook_name="blocks.8.hook_resid_pre".
    Acts are dense, (*batch, d_sae). Warns of AbsTopK, whose negative acts SAELens' dashboards do not show: see
    `split_signs`. Raises ValueError for one that SAELens cannot run: a transcoder, a crosscoder or one with a skip
    connection; ImportError without SAELens.
    """
    found = register_saelens()
    sae = usable(sae, "SAELens")
    return found.of(sae, metadata)


def as_saebench(
    sae: SparseAutoencoder,
    *,
    model_name: str,
    hook_layer: int,
    hook_name: str | None = None,
    context_size: int = 128,
) -> SAEBenchModule:
    """`sae` as SAEBench takes one, sharing its parameters: `selected_saes=[("name", fastsae.as_saebench(sae, ...))]`.

    hook_name: left out, the residual stream after block hook_layer. Norms of decoder rows other than 1 are multiplied
    into acts. Warns and raises as `as_saelens`, for SAEBench.
    """
    _imported("sae_bench.custom_saes.custom_sae_config", "SAEBench", "sae-bench")
    from fastsae.hosts.saebench import SAEBenchModule

    hook_name = hook_name or f"blocks.{hook_layer}.hook_resid_post"
    return SAEBenchModule(usable(sae, "SAEBench"), model_name, hook_layer, hook_name, context_size)


def usable(sae: SparseAutoencoder, host: str) -> SparseAutoencoder:
    """`sae`. Raises ValueError if its reconstruction depends on more than its acts."""
    sae = as_sae(sae, "sae")
    sae.check_whole(host)
    wrong = {
        "a transcoder": sae.d_in != sae.d_out, "a crosscoder": sae.layers > 1, "skip=True": sae.skip,
        f"normalize={sae.norm.mode!r}": sae.norm.mode in PER_TOKEN,
    }  # fmt: skip
    if found := [what for what, is_so in wrong.items() if is_so]:
        raise ValueError(
            f"the SAE is or has {' and '.join(found)}; {host} decodes acts alone, from one stream into the same one"
        )
    say_signs(sae, host)
    return sae


def _imported(module: str, library: str, package: str) -> Any:
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise ImportError(f"{library} is not installed ({error}): pip install {package}") from error


__all__ = ["as_saebench", "as_saelens", "register_saelens", "split_signs", "usable"]
