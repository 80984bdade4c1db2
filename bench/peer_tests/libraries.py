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
    The last three change both runs alike; `adapted` says how, for the page.
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

    def adapted(self) -> list[str]:
        """What is changed for both runs, in words."""
        names = {place.partition(":")[2]: ", ".join(its) for place, its in self.defaults.items()}
        given = [f"`{name}({arguments}=)` has a default" for name, arguments in names.items()]
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
)

EXPLAINED: dict[str, str] = {
    "SAELENS tests/saes/test_batchtopk_sae.py::test_BatchTopKTrainingSAE_save_and_load_inference_sae[False]": (
        "`rand_like` fills a transposed encoder in another order, and SAELens' own class fails with these weights too: "
        "one act is between the running threshold and the smallest act chosen"
    ),
    "SAELENS tests/saes/test_matryoshka_batchtopk_sae.py::"
    "test_MatryoshkaBatchTopKTrainingSAE_matches_dictionary_learning": (
        "`feature_acts` of a training step is sparse, and `torch.testing` refuses to compare layouts"
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
