"""The settings of `dpfast federate`: one TOML file, every name and type checked."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from dpfast.segmentation._extras import needs_extra
from dpfast.segmentation.data_settings import DataSettings
from dpfast.segmentation.settings import (
    AdaptiveMorphology,
    ModelSettings,
    MorphologySettings,
    NoMorphology,
    OptimizerSettings,
    OutputSettings,
    PrivacySettings,
    Settings,
    TrainingSettings,
)
from dpfast.segmentation.settings_file import (
    Count,
    Fraction,
    Positive,
    Seed,
    Table,
    read_settings,
)

with needs_extra("dpfast federate", extra="federated"):
    from pydantic import Field, model_validator

__all__ = [
    "DirichletSites",
    "FederatedSettings",
    "IidSites",
    "NaturalSites",
    "RemoteSites",
    "load_federated_settings",
]


class NaturalSites(Table):
    """Sites as the data have them: columns of the index; see `natural_sites`."""

    kind: Literal["natural"]
    columns: Annotated[list[str], Field(min_length=1)]


class IidSites(Table):
    """Patients dealt out evenly; see `iid_sites`."""

    kind: Literal["iid"]
    number: Annotated[int, Field(ge=2)]
    seed: Seed = 0


class DirichletSites(Table):
    """Patients dealt out unevenly by a column; see `dirichlet_sites`."""

    kind: Literal["dirichlet"]
    number: Annotated[int, Field(ge=2)]
    alpha: Positive
    column: str
    seed: Seed = 0


class RemoteSites(Table):
    """Sites that hold their own data: the server has none of them, and each site has all of its.

    Attributes:
      names: of all sites. Each has settings of its own, of which everything but `data.path` and
        `output` should be the server's; a site trusts its own.
    """

    kind: Literal["remote"]
    names: Annotated[list[str], Field(min_length=2)]

    @model_validator(mode="after")
    def _check(self) -> RemoteSites:
        if len(set(self.names)) < len(self.names):
            raise ValueError("names must be different")
        return self


SitesSettings = NaturalSites | IidSites | DirichletSites | RemoteSites


class LocalTraining(OptimizerSettings):
    """What a site does in a round; its optimizer begins anew in each.

    Attributes:
      local_epochs: passes over the site's data.
      proximal_mu: of FedProx, the pull towards the round's weights.
    """

    local_epochs: Count = 1
    proximal_mu: Annotated[float, Field(ge=0.0)] = 0.0


class FederationSettings(Table):
    """What the server does.

    Attributes:
      rounds: of the whole run.
      strategy, strategy_arguments: one of Flower's; see `make_strategy`.
      site_weights: public, by the sites' names; those that are not named have 1. Sizes of sites are
        not public, so they are no weights.
      min_sites: with fewer usable answers a round changes nothing and the run stops; all of them
        where it is not given.
      evaluate_every: rounds between evaluations.
      seed: of noise, sampling and shuffling: epsilon is infinite with it, for tests alone.
    """

    rounds: Count
    strategy: Literal[
        "fedavg",
        "fedprox",
        "fedavgm",
        "fedadam",
        "fedadagrad",
        "fedyogi",
        "fedmedian",
        "fedtrimmedavg",
        "krum",
        "multikrum",
        "bulyan",
    ] = "fedavg"
    strategy_arguments: dict[str, Any] = Field(default_factory=dict)
    site_weights: dict[str, Positive] = Field(default_factory=dict)
    min_sites: Count | None = None
    evaluate_every: Count = 1
    seed: Seed | None = None


class SitePrivacySettings(Table):
    """DP-FedAvg: whole sites are protected, by a server that they trust; see `PrivateSites`.

    Attributes:
      target_delta: at which epsilon is stated.
    """

    max_update_norm: Positive
    noise_multiplier: Positive
    sample_rate: Annotated[float, Field(gt=0.0, le=1.0)] = 1.0
    target_delta: Fraction


class FederatedSettings(Table):
    """All tables of the file. Paths start at the folder in which the command is run."""

    data: Annotated[DataSettings, Field(discriminator="kind")]
    sites: Annotated[SitesSettings, Field(discriminator="kind")]
    model: ModelSettings = ModelSettings()
    training: LocalTraining
    federation: FederationSettings
    privacy: PrivacySettings
    site_privacy: SitePrivacySettings | None = None
    morphology: Annotated[MorphologySettings, Field(discriminator="kind")] = NoMorphology(
        kind="none"
    )
    output: OutputSettings

    @model_validator(mode="after")
    def _check(self) -> FederatedSettings:
        # What `dpfast train` refuses is refused here before any data are read.
        self.of_site(Path(self.output.folder))
        federation = self.federation
        if self.site_privacy is not None:
            if self.privacy.private:
                raise ValueError("site_privacy needs privacy.private = false, another promise")
            if federation.strategy != "fedavg" or federation.site_weights:
                raise ValueError("site_privacy is an average of its own: no strategy, no weights")
            if isinstance(self.morphology, AdaptiveMorphology):
                raise ValueError("site_privacy does not cover sizes measured on masks")
        if federation.strategy == "fedprox" and self.training.proximal_mu == 0.0:
            raise ValueError("strategy 'fedprox' needs training.proximal_mu > 0")
        return self

    @property
    def method(self) -> str:
        """The method's name in the literature, for reports."""
        if self.site_privacy is not None:
            return "dp_fedavg"
        if not self.privacy.private:
            return "non_private"
        names = {"fixed": "dp_fl", "percentile_paper": "adp_fl_paper"}
        return names.get(self.privacy.threshold.kind, "adp_fl")

    def of_site(self, folder: Path) -> Settings:
        """The settings of `dpfast train` that one site's part amounts to."""
        local = self.training
        training = TrainingSettings(
            epochs=self.federation.rounds * local.local_epochs,
            averaging=0.0,
            **local.model_dump(exclude={"local_epochs", "proximal_mu"}, exclude_unset=True),
        )
        return Settings(
            data=self.data,
            model=self.model,
            training=training,
            privacy=self.privacy,
            morphology=self.morphology,
            output=OutputSettings(folder=str(folder)),
        )


def load_federated_settings(path: Path) -> FederatedSettings:
    """Read a settings file; see `dpfast.segmentation.settings.read_settings`."""
    return read_settings(path, FederatedSettings)
