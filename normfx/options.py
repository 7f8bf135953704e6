"""Options: every switch of normfx, parsed from what `torch.compile(options=...)` hands over."""

from __future__ import annotations

import difflib
import fnmatch
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Literal, get_args, get_type_hints

from normfx.calibration.statistics import Statistics
from normfx.errors import OptionError

Lowering = Literal["inductor", "eager"]
Weights = Literal["live", "frozen"]
Kernels = Literal["auto", "inductor", "triton"]


@dataclass(frozen=True, slots=True)
class Adaptation:
    """The option `test_time`: a name, or a mapping of these attributes.

    Attributes:
        kind: "alpha-bn" or "unmix-tns"; see `normfx.nn.AlphaBatchNorm` and `UnMixTNS`.
        weight_of_test_batch: of alpha-BN, from 0 (as trained) to 1 (the batch alone).
        components: of UnMix-TNS: how many.
        momentum: of UnMix-TNS: how far its components move at a call.
        temperature: of UnMix-TNS: of the softmax over the components.
        seed: of UnMix-TNS: its components begin at random around the trained statistics.
    """

    kind: Literal["alpha-bn", "unmix-tns"]
    weight_of_test_batch: float = 0.1
    components: int = 16
    momentum: float = 0.1
    temperature: float = 0.07
    seed: int = 0

    @classmethod
    def parse(cls, given: Any) -> Adaptation | None:
        """Raises OptionError where it is none."""
        if given is None or isinstance(given, Adaptation):
            return given
        values: Any = {"kind": given} if isinstance(given, str) else given
        known = {f.name: f.type for f in fields(cls)}
        kinds = get_args(get_type_hints(cls)["kind"])
        if not isinstance(values, Mapping) or values.get("kind") not in kinds:
            raise OptionError(
                f"option 'test_time': expected one of {', '.join(map(repr, kinds))}, or a mapping "
                f"with that as its 'kind', got {given!r}."
            )
        for name in values:
            if name not in known:
                raise OptionError(_unknown("entry of the option 'test_time'", name, set(known)))
        made = cls(**values)
        for name, least, most in (
            ("weight_of_test_batch", 0, 1),
            ("components", 1, None),
            ("momentum", 0, 1),
            ("temperature", 1e-6, None),
            ("seed", 0, None),
        ):
            value, whole = getattr(made, name), known[name] == "int"
            right = isinstance(value, int if whole else (int, float)) and value is not True
            if not right or value < least or (most is not None and value > most):
                upper = "" if most is None else f" to {most}"
                raise OptionError(
                    f"option 'test_time': expected {name} to be a {'whole ' * whole}number from "
                    f"{least}{upper}, got {value!r}."
                )
        return made


@dataclass(frozen=True, slots=True)
class Options:
    """The switches of normfx. All values are plain, so that they can be part of a cache key.

    Attributes:
        strict: raise what a stage raises, instead of falling back to plain Inductor with a warning.
        lowering: "inductor" compiles the rewritten graph; "eager" runs it as it is (tests,
            debugging).
        weights: "live" follows every update of a folded weight; "frozen" folds once and skips the
            check per call.
        kernels: on a GPU, "auto" times normfx's Triton kernels against Inductor's code, once for
            each kind and size of norm, and takes what is faster; "inductor" never does; "triton"
            takes a kernel wherever there is one.
        rules: names of the exact rules that may run; None: all that are on by default.
        skip: what not to do, each as "RULE@SITE" with the names that a report prints, or patterns
            of them ("fold-*@encoder.*"): the rule then leaves that norm as it is.
        statistics: a `Statistics` of `normfx.calibrate`, or the path of its file: norms become the
            static maps that it gives (CALIBRATED).
        sites: names or patterns of the norms that become static; None: those that the statistics
            choose, or all.
        test_time: "alpha-bn" or "unmix-tns", or a mapping with that as its "kind": the BatchNorms
            of a model in evaluation adapt to what they are given (CALIBRATED); see `Adaptation`.
        inductor: Inductor's own options, passed on as they are.
    """

    strict: bool = False
    lowering: Lowering = "inductor"
    weights: Weights = "live"
    kernels: Kernels = "auto"
    rules: tuple[str, ...] | None = None
    skip: tuple[str, ...] = ()
    statistics: Statistics | None = None
    sites: tuple[str, ...] | None = None
    test_time: Adaptation | None = None
    inductor: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def parse(cls, given: Mapping[str, Any] | None) -> Options:
        """Options from a mapping.

        Args:
            given: names and values; None and the empty mapping are the defaults.

        Raises:
            OptionError: a name is unknown (the nearest known one is named), or a value is not of
                its type.
            StatisticsError: the file of statistics is none, or lacks one of the sites.
            OSError: it cannot be read.
        """
        known = {f.name for f in fields(cls)}
        hints = get_type_hints(cls)
        values: dict[str, Any] = {}
        for name, value in (given or {}).items():
            if name not in known:
                raise OptionError(_unknown("option", name, known))
            values[name] = _checked(name, value, hints[name])
        parsed = cls(**values)
        if parsed.sites is not None and parsed.statistics is None:
            raise OptionError("option 'sites' needs the option 'statistics': see normfx.calibrate.")
        if parsed.statistics is not None:
            parsed.statistics.resolve(parsed.sites)  # raises for a site that it does not have
        return parsed

    def allows(self, rule: str, site: str | None = None) -> bool:
        """Whether a rule may run, and may change this site, if one is given."""
        on = self.rules is None or rule in self.rules
        return on and not (site is not None and self.skips(rule, site))

    def skips(self, rule: str, site: str) -> bool:
        """Whether a rule, or recognition, or `lower`, is to leave this site as it is."""
        return any(_matches(entry, rule, site) for entry in self.skip)

    def asks_for(self, rule: str) -> bool:
        """Whether a rule is named, so that it runs where it is off by default."""
        return self.rules is not None and rule in self.rules


def _checked(name: str, value: Any, hint: Any) -> Any:
    if name == "rules":
        return _checked_rules(value)
    if name == "skip":
        return _checked_skip(value)
    if name == "statistics":
        return _checked_statistics(value)
    if name == "test_time":
        return Adaptation.parse(value)
    if name == "sites":
        return None if value is None else _strings(name, value, "site names")
    choices = get_args(hint)
    if choices and all(isinstance(c, str) for c in choices):
        if value not in choices:
            raise OptionError(
                f"option {name!r}: expected one of {', '.join(map(repr, choices))}, got {value!r}."
            )
        return value
    expected = Mapping if name == "inductor" else bool
    if not isinstance(value, expected):
        wanted = "a mapping of Inductor's options" if expected is Mapping else "True or False"
        raise OptionError(f"option {name!r}: expected {wanted}, got {value!r}.")
    return dict(value) if isinstance(value, Mapping) else value


def _checked_rules(value: Any) -> tuple[str, ...] | None:
    from normfx.passes import RULES

    if value is None:
        return None
    rules = _strings("rules", value, "rule names")
    for rule in rules:
        if rule not in RULES:
            raise OptionError(_unknown("rule", rule, set(RULES)))
    return rules


def _checked_skip(value: Any) -> tuple[str, ...]:
    from normfx.passes import RULES

    entries = _strings("skip", value, "RULE@SITE")
    for entry in entries:
        rule, at, site = entry.partition("@")
        if not (rule and at and site):
            raise OptionError(f"option 'skip': expected RULE@SITE, got {entry!r}.")
        known = {*RULES, "lower"}
        if not rule.startswith("recognise-") and not fnmatch.filter(known, rule):
            raise OptionError(_unknown("rule", rule, known))
    return entries


def _matches(entry: str, rule: str, site: str) -> bool:
    """Whether an entry of `skip` is of this rule and site, by name or by pattern."""
    if entry == f"{rule}@{site}":  # a name may have brackets, which are a pattern too
        return True
    rules, _, sites = entry.partition("@")
    return fnmatch.fnmatchcase(rule, rules) and fnmatch.fnmatchcase(site, sites)


def _checked_statistics(value: Any) -> Statistics | None:
    if isinstance(value, (str, os.PathLike)):
        return Statistics.load(value)
    if value is None or isinstance(value, Statistics):
        return value
    raise OptionError(
        f"option 'statistics': expected a normfx.Statistics or the path of its file, got {value!r}."
    )


def _strings(name: str, value: Any, what: str) -> tuple[str, ...]:
    if (
        isinstance(value, str)
        or not isinstance(value, Iterable)
        or not all(isinstance(item, str) for item in value)
    ):
        raise OptionError(f"option {name!r}: expected a list of {what}, got {value!r}.")
    return tuple(value)


def _unknown(what: str, name: str, known: set[str]) -> str:
    nearest = difflib.get_close_matches(name, sorted(known), n=1)
    meant = f" Did you mean {nearest[0]!r}?" if nearest else ""
    return f"unknown {what} {name!r}.{meant} Known: {', '.join(sorted(known))}."
