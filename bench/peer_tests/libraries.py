"""Whose tests are run, where they are from, and why one may differ. Another library is one more entry of LIBRARIES."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Library:
    """A library whose classes `fastsae.accelerate` swaps.

    variable: its name on the command line and in the Makefile. tests: the files to run, as patterns inside its sources.
    home: the repository to clone; None: its source archive, which pip finds, holds the tests.
    defaults: by "module:Class", arguments that the installed version wants and that tests of an older one leave out.
    models_on_cpu: models that its tests move to "cuda" stay where they are.
    no_hub: models that its tests take from the hub through TransformerLens are made up.
    renamed: by "module:name", as tests of another version call it, what the installed one calls it.
    seeded: torch's random numbers begin anew with each test, so that both runs get the same.
    bare: the package's own `__init__`, which imports what is not installed and its SAEs do not need, is not run.
    The last six change both runs alike; `adapted` says how, for the page.
    """

    variable: str
    package: str
    distribution: str
    tests: tuple[str, ...]
    home: str | None = None
    environment: Mapping[str, str] = field(default_factory=dict)
    defaults: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    models_on_cpu: bool = False
    no_hub: bool = False
    renamed: Mapping[str, str] = field(default_factory=dict)
    seeded: bool = False
    bare: bool = False

    def adapted(self) -> list[str]:
        """What is changed for both runs, in words."""
        names = {place.partition(":")[2]: ", ".join(its) for place, its in self.defaults.items()}
        given = [f"`{name}({arguments}=)` has a default" for name, arguments in names.items()]
        given += [f"`{place.partition(':')[2]}` is `{now}`" for place, now in self.renamed.items()]
        if self.bare:
            given.append(f"`{self.package}/__init__.py` is not run")
        if self.seeded:
            given.append("each test begins with `torch.manual_seed(0)`")
        if self.models_on_cpu:
            given.append('a model moved to "cuda" stays on the CPU')
        if self.no_hub:
            given.append("a model from the hub has random weights and a token for each byte")
        return given


LIBRARIES = (
    Library(
        "SAELENS",
        "sae_lens",
        "sae-lens",
        (
            "tests/saes/test_*.py",
            "tests/refactor_compatibility/test_*.py",
            "tests/training/test_sae_trainer.py",
            "tests/analysis/test_hooked*.py",
            "tests/test_evals.py",
            "tests/test_llm_sae_training_runner.py",
        ),
        home="https://github.com/jbloomAus/SAELens",
        defaults={"sae_lens.saes.sae:TrainStepInput": {"is_logging_step": False}},
        no_hub=True,
    ),
    Library(
        "DICTIONARY_LEARNING",
        "dictionary_learning",
        "dictionary-learning",
        ("tests/unit/test_*.py",),
        home="https://github.com/saprmarks/dictionary_learning",
    ),
    Library(
        "SPARSIFY",
        "sparsify",
        "eai-sparsify",
        ("tests/test_*.py",),
        environment={"SPARSIFY_DISABLE_TRITON": "1"},
        models_on_cpu=True,
    ),
    Library(
        "CIRCUIT_TRACER",
        "circuit_tracer",
        "circuit-tracer",
        (
            "tests/transcoder/test_*.py",
            "tests/test_cross_layer_transcoder.py",
            "tests/test_single_layer_transcoder.py",
            "tests/utils/test_disk_offload.py",
        ),
        home="https://github.com/decoderesearch/circuit-tracer",
        renamed={"circuit_tracer.transcoder.single_layer_transcoder:load_transcoder": "load_relu_transcoder"},
    ),
    Library(
        "OVERCOMPLETE",
        "overcomplete",
        "overcomplete",
        ("tests/sae/test_*.py",),
        home="https://github.com/KempnerInstitute/overcomplete",
        seeded=True,
        bare=True,
    ),
    Library(
        "LLAMASCOPIUM",
        "llamascopium",
        "llamascopium",
        (
            "tests/unit/test_sae.py",
            "tests/unit/test_initializer.py",
            "tests/unit/test_from_local.py",
            "tests/unit/test_evaluator.py",
        ),
        home="https://github.com/OpenMOSS/Language-Model-SAEs",
    ),
)

EXPLAINED: dict[str, str] = {
    "SAELENS tests/saes/test_batchtopk_sae.py::test_BatchTopKTrainingSAE_save_and_load_inference_sae[False]": (
        "`rand_like` fills a transposed encoder in another order, and SAELens' own class fails with these weights too: "
        "one act is between the running threshold and the smallest act chosen"
    ),
    "OVERCOMPLETE tests/sae/test_save_and_load.py::test_eval_and_save_sae[BatchTopKSAE]": (
        "the running threshold is an act of fastsae's forward pass; overcomplete's own class, after loading, sums that "
        "act in another order, gets 1.5733086 for 1.5733087, and >= leaves it out; it depends on the random numbers"
    ),
    "LLAMASCOPIUM tests/unit/test_from_local.py::test_from_local_single_device": (
        "the test gives `state_dict()` to safetensors itself, which writes contiguous tensors only, and W_E is "
        "transposed in memory; `save_pretrained` gives it contiguous ones"
    ),
}
"""By "VARIABLE file::test": why a test that passes with theirs fails with ours."""


def named(variable: str) -> Library:
    """The library of this name. Raises ValueError for another."""
    for library in LIBRARIES:
        if library.variable == variable:
            return library
    raise ValueError(f"{variable} is not known; expected one of {', '.join(one.variable for one in LIBRARIES)}")


def explained(library: Library, test: str) -> str | None:
    return EXPLAINED.get(f"{library.variable} {test}")
