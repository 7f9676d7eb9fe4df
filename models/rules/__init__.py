"""The rules there are, by name."""

from collections.abc import Mapping

from models.elastic.plan import Rule
from models.rules.dense import DenseRule
from models.rules.residual_cache import ResidualCacheRule
from models.rules.router import RouterRule

RULES: Mapping[str, Rule] = {rule.name: rule for rule in (DenseRule(), RouterRule(), ResidualCacheRule())}
