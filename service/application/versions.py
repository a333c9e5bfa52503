"""Which versions of a model are served: all, the latest ones, or specific ones."""

from collections.abc import Collection
from dataclasses import replace

from normcore.errors import ParameterError
from service.engine.protocol import ModelOptions

LEFT_OUT = "not among the versions that the model's version policy serves"


def served_versions(versions: Collection[int], options: ModelOptions) -> Collection[int]:
    """Those that the policy in the options chooses. Raises ParameterError where one of them does not exist."""
    for version in options.specific_versions:
        if version not in versions:
            expected = f"versions among {', '.join(map(str, sorted(versions)))}"
            raise ParameterError("version_policy", expected=expected, received=f"{version}, which does not exist")
    return options.specific_versions or sorted(versions)[-options.latest_versions :]


def with_policy_of(known: ModelOptions, options: ModelOptions) -> ModelOptions:
    """The options of a new version of a model; the policy is the model's."""
    return replace(options, latest_versions=known.latest_versions, specific_versions=known.specific_versions)
