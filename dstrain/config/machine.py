"""The rules of a machine, for a hardware group and for a hardware file alike."""

from dataclasses import fields
from math import isfinite

from dstrain.config.hardware import Evidence, HardwareConfig
from dstrain.config.keys import nearest
from dstrain.config.rules import need
from dstrain.errors import ConfigError

# Of evidence, the surest first (Evidence.kind).
KINDS = ("specification", "calibration", "benchmark", "trace", "assumed")

# By the end of a key: what its value means, for whoever has to mend it.
CURES = {
    "_tflops": "Give TFLOP/s, or 0 where there is no such unit.",
    "_gib": "Give GiB, or 0 where it is not known.",
    "_gbytes_per_s": "Give GB/s of one direction, or 0 where it is not known.",
    "_latency_us": "Give microseconds, or 0 where they are not known.",
    "_us": "Give microseconds.",
    "_per_hour": "Give US dollars, or 0 to tell no price.",
}

# Numbers a machine consists of.
CONSTANTS = tuple(entry.name for entry in fields(HardwareConfig) if isinstance(entry.default, (int, float)))


def is_share(name: str) -> bool:
    """Whether a constant is a share of another one, which it can't exceed."""
    return name == "sustained" or name.endswith("efficiency")


def check_hardware(hardware: HardwareConfig) -> None:
    """Raises ConfigError for the first constant, or evidence, that no machine can have."""
    for name in CONSTANTS:
        _check_number(name, getattr(hardware, name))
    named: set[str] = set()
    for index, evidence in enumerate(hardware.evidence):
        _check_evidence(f"hardware.evidence[{index}]", evidence, named)
        named |= set(evidence.of)


def check_predictable(hardware: HardwareConfig, devices: int) -> None:
    """Raises ConfigError where the file lacks a speed without which a job on so many devices can't be predicted."""
    wanted = ["peak_bf16_tflops", "memory_gbytes_per_s"]
    wanted += ["intra_node_gbytes_per_s"] * (min(devices, hardware.devices_per_node) > 1)
    wanted += ["inter_node_gbytes_per_s"] * (devices > hardware.devices_per_node)
    for name in wanted:
        rule = f"hardware={hardware.name} does not say it, and a prediction for {devices:,} devices needs it"
        cure = f"Give hardware.{name}=<number>, choose another hardware=<name>, or measure it: dstrain calibrate."
        need(getattr(hardware, name) > 0, (f"hardware.{name}", getattr(hardware, name)), rule, cure)


def _check_number(name: str, value: float) -> None:
    field = (f"hardware.{name}", value)
    cure = next((text for end, text in CURES.items() if name.endswith(end)), "Raise it.")
    need(isfinite(value), field, "it must be a finite number", cure)
    if is_share(name):
        need(0 < value <= 1, field, "it is a share: above 0, and at most 1", "Set it to 0.8, say.")
    else:
        least = 1 if name == "devices_per_node" else 0
        need(value >= least, field, f"it must be at least {least}", cure)


def _check_evidence(field: str, evidence: Evidence, named: set[str]) -> None:
    cure = f"Choose one of {', '.join(KINDS)}."
    need(evidence.kind in KINDS, (f"{field}.kind", evidence.kind), "there is no such kind of evidence", cure)
    need(bool(evidence.source), (f"{field}.source", '""'), "evidence says where it comes from", "Name the document.")
    for key in evidence.of:
        if key not in CONSTANTS:
            meant = nearest(key, list(CONSTANTS))
            hint = f"Did you mean {meant}?" if meant else f"Name any of {', '.join(CONSTANTS)}."
            raise ConfigError(f"{field}.of", key, "a machine has no such constant", hint)
        need(key not in named, (f"{field}.of", key), "other evidence names it already", "Keep one of the two.")
