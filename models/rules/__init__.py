"""The table of rules. A rule is its file and its line here."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any, Protocol, TypeVar

from models.elastic.plan import Policy, Rule
from models.errors import WeightsError
from models.rules.dense import DenseRule
from models.rules.router import RouterRule

P = TypeVar("P", bound=Policy)


class CalibratedRule(Rule[P], Protocol[P]):
    """A rule with what serving needs besides: the type of its policies, and which of them to measure."""

    @property
    def policy_type(self) -> type[P]: ...

    def ladder(self, published: Sequence[P]) -> list[P]:
        """The policies to calibrate. `published` are the policies that a checkpoint's authors used."""
        ...


RULES: Mapping[str, CalibratedRule[Any]] = {
    rule.policy_type.rule: rule
    for rule in (
        DenseRule(),
        RouterRule(),
    )
}


def ladder(rule: str, published: Sequence[Policy]) -> list[Policy]:
    """The policies of `rule` to calibrate; `published` ones of other rules are left out."""
    policies: list[Policy] = RULES[rule].ladder([policy for policy in published if policy.rule == rule])
    return policies


def policy_entry(policy: Policy) -> dict[str, Any]:
    """A policy as our files have it: its rule's name and its settings."""
    return {"rule": policy.rule, "policy": asdict(policy)}


def policy_of(entry: Mapping[str, Any]) -> Policy:
    """The policy of an `entry` that `policy_entry` wrote. Raises WeightsError if a rule or a setting is unknown."""
    name = str(entry.get("rule"))
    if name not in RULES:
        raise WeightsError(f"there is no rule '{name}'; there are: {', '.join(RULES)}")
    try:
        policy: Policy = RULES[name].policy_type(**entry["policy"])
    except (KeyError, TypeError) as error:
        raise WeightsError(f"the settings of a policy of rule '{name}' do not fit: {error!r}") from error
    return policy
