"""Prefixes that wrappers put before every key: DistributedDataParallel's `module.`, torch.compile's `_orig_mod.`."""

from collections.abc import Collection

_WRAPPERS = ("module.", "_orig_mod.")


def wrapper_prefix(keys: Collection[str]) -> str:
    """The prefix of all keys that wrappers have put there; it may be several, and is often empty.

    >>> wrapper_prefix(["module._orig_mod.conv.weight", "module._orig_mod.conv.bias"])
    'module._orig_mod.'
    """
    prefix = ""
    while keys:
        found = next((each for each in _WRAPPERS if all(key.startswith(prefix + each) for key in keys)), None)
        if found is None:
            break
        prefix += found
    return prefix


__all__ = ["wrapper_prefix"]
