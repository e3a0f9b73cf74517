"""Private training of one model by several hospitals.

What needs Flower (rounds, strategies, engines) is imported from its own module, for Flower is an
optional package.
"""

from dpfast.federated.partition import dirichlet_sites, iid_sites, natural_sites
from dpfast.federated.site import BudgetSpentError, Site, SiteFolder, Update

__all__ = [
    "BudgetSpentError",
    "Site",
    "SiteFolder",
    "Update",
    "dirichlet_sites",
    "iid_sites",
    "natural_sites",
]
