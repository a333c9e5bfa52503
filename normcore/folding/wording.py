"""Certificates in words: what was compared, by how much it differs, and what the difference is measured against."""

from collections.abc import Sequence

from normcore.folding.report import Probe, Region


def describe_equivalence(probes: Sequence[Probe], regions: Sequence[Region]) -> str:
    told = [probe for probe in probes if probe.conclusive]
    folded = max(_relative(probe.error_folded, probe.scale) for probe in told)
    original = max(_relative(probe.error_original, probe.scale) for probe in told)
    count = len({probe.seed for probe in probes})
    sentence = (
        f"The folded network computes the same function: over {count} probes its largest error against float64 is "
        f"{folded:.1e} of the output's scale; the original's is {original:.1e}."
    )
    if not regions:
        return sentence
    local = max(_relative(region.error, region.scale) for region in regions)
    return (
        f"{sentence} Each of {len(regions)} rewritten parts, compared by itself in float64, differs by at most "
        f"{local:.1e}, which rounding the stored weights explains."
    )


def describe_silent_probe(probe: Probe) -> str:
    return f"probe of kind {probe.kind} (seed {probe.seed}), output {probe.output}: {probe.reason}"


def describe_failed_probe(probe: Probe) -> str:
    where = f"on a probe of kind {probe.kind} (seed {probe.seed})"
    error = max(probe.error_folded, probe.error_exact)
    if error == float("inf"):
        return (
            "The folded network computes another function: "
            f"{where}, {probe.output} has another shape, or is NaN or infinite at other places."
        )
    return (
        f"The folded network computes another function: {where}, {probe.output} is "
        f"{_relative(error, probe.scale):.1e} of its scale away from float64; by the original's own error "
        f"{_relative(probe.bound, probe.scale):.1e} is allowed."
    )


def describe_failed_region(region: Region) -> str:
    if region.error == float("inf"):
        difference = "has another shape, or is NaN or infinite at other places"
    else:
        difference = (
            f"differs by {_relative(region.error, region.scale):.1e} of its scale in float64, "
            "more than rounding the stored weights explains"
        )
    change = f"{' -> '.join(region.before)} became {' -> '.join(region.after)}"
    return f"The folded network computes another function: where {change}, {region.output} {difference}."


def _relative(error: float, scale: float) -> float:
    return error / scale if scale > 0 else error
