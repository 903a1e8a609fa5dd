"""Answers what a student may minimise: a classification loss and weighted distillation terms, each with its settings.

Does not compute anything (`maths.losses` does). A section's name below `loss` is the term's name in the registry,
and its fields are the settings of that term.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

Positive = Annotated[float, Field(gt=0)]
NonNegative = Annotated[float, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]
BelowOne = Annotated[float, Field(ge=0, lt=1)]
Count = Annotated[int, Field(ge=1)]


class Strict(BaseModel):
    """Base of all settings: immutable, finite, unknown keys refused."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True, allow_inf_nan=False)


class ClassificationConfig(Strict):
    """The loss against the labels."""

    name: Literal["cross_entropy", "balanced_softmax", "class_balanced", "focal", "ldam"] = "cross_entropy"
    weight: NonNegative = 1.0
    tau: NonNegative = Field(1.0, description="balanced_softmax: strength of the label prior")
    gamma: NonNegative = Field(2.0, description="focal: how much easy samples are discounted")
    beta: BelowOne = Field(0.9999, description="effective number: class_balanced and re-weighting")
    max_margin: NonNegative = Field(0.5, description="ldam: margin of the rarest class")
    scale: Positive = Field(
        30.0, description="ldam: logits per unit of cosine; only scale x max_margin matters"
    )
    reweight_from_epoch: Annotated[int, Field(ge=0)] | None = Field(
        None, description="classes weigh by their effective number from this epoch on; null: never"
    )

    @model_validator(mode="after")
    def _weighs_once(self) -> ClassificationConfig:
        if self.name == "class_balanced" and self.reweight_from_epoch is not None:
            raise ValueError(
                "class_balanced weighs classes from the first epoch on; use cross_entropy with reweight_from_epoch"
            )
        return self


class Term(Strict):
    """One distillation term; weight 0 turns it off."""

    weight: NonNegative = 0.0


class KdConfig(Term):
    """Plain distillation of the teacher's logits as they are (arXiv 1503.02531)."""

    temperature: Positive = 4.0


class DkdConfig(Term):
    """Decoupled distillation: target class and the others apart (arXiv 2203.08679)."""

    temperature: Positive = 4.0
    alpha: NonNegative = Field(1.0, description="weight of the target class's part")
    beta: NonNegative = Field(8.0, description="weight of the other classes' part")


class BkdConfig(Term):
    """Balanced distillation: the teacher's classes weighed by their effective number (arXiv 2104.10510)."""

    temperature: Positive = 2.0
    beta: BelowOne = 0.9999


class LtkdConfig(Term):
    """Long-tailed distillation: head, medium and tail group apart, each as important (arXiv 2506.18496)."""

    temperature: Positive = 4.0
    alpha: NonNegative = Field(1.0, description="weight of the part between groups")
    beta: NonNegative = Field(1.0, description="weight of the part within groups")


class DiveConfig(Term):
    """Virtual examples: the teacher's distribution flattened by a power (arXiv 2103.15042)."""

    temperature: Positive = 3.0
    power: Positive = 0.5


class CckdConfig(Term):
    """The teacher as far as it believes the label, else the label (arXiv 2107.06993)."""

    temperature: Positive = 4.0


class NdConfig(Term):
    """Norm and direction of the class mean (arXiv 2305.17007)."""


class PldConfig(Term):
    """List-wise Plackett-Luce loss, true class first (arXiv 2506.12542)."""

    temperature: Positive = 1.0


class KnowledgeAdjustmentConfig(Term):
    """Distillation of logits in which a wrong largest one is exchanged with the label's (arXiv 1911.07471)."""

    temperature: Positive = 4.0


class RrdConfig(Term):
    """Representation-rectified distillation; weight is alpha in design.md section 4."""

    target: Literal["teacher", "balanced", "class_mean", "prior", "mix"] = "teacher"
    prior: Literal["auto", "simplex", "sphere", "class_mean"] = Field(
        "auto", description="where balanced class means lie; auto: simplex if there are dimensions enough"
    )
    gate: Literal["full", "constant", "by_count"] = "full"
    gate_strength: Fraction = 1.0
    form: Literal["cosine", "norm_aware"] = Field(
        "cosine", description="norm_aware: the student's feature must also be as long as the teacher's"
    )


class LrdConfig(Term):
    """Logit-rectified distillation; weight is beta in design.md section 4."""

    temperature: Positive = 2.0
    tau_prior: NonNegative = Field(1.5, description="strength of the label prior taken off the teacher")
    exchange: bool = Field(False, description="a wrong largest logit changes places with the label's")
    space: Literal["balanced", "long_tailed"] = Field(
        "balanced",
        description="where the two are compared: without the label prior, or with it on both sides",
    )
    weighting: Literal["none", "effective_number"] = Field(
        "none", description="effective_number: classes of the target weigh by it, as in bkd"
    )
    beta: BelowOne = 0.9999
    gate: Literal["none", "confidence"] = Field(
        "none", description="confidence: a sample weighs by the target's probability of its label"
    )


class LossConfig(Strict):
    """The objective: a classification loss plus weighted distillation terms; weight 0 turns a term off."""

    classification: ClassificationConfig = ClassificationConfig()
    kd: KdConfig = KdConfig()
    dkd: DkdConfig = DkdConfig()
    bkd: BkdConfig = BkdConfig()
    ltkd: LtkdConfig = LtkdConfig()
    dive: DiveConfig = DiveConfig()
    cckd: CckdConfig = CckdConfig()
    nd: NdConfig = NdConfig()
    pld: PldConfig = PldConfig()
    knowledge_adjustment: KnowledgeAdjustmentConfig = KnowledgeAdjustmentConfig()
    rrd: RrdConfig = RrdConfig()
    lrd: LrdConfig = LrdConfig()

    @model_validator(mode="after")
    def _one_form_of_each(self) -> LossConfig:
        raw = [name for name in self.active_terms if name not in ("lrd", "rrd", "nd")]
        if "lrd" in self.active_terms and raw:
            raise ValueError(
                f"{raw[0]} and lrd ask for the teacher's logits in two forms; set {raw[0]}.weight or lrd.weight to 0"
            )
        if {"nd", "rrd"} <= set(self.active_terms):
            raise ValueError(
                "nd and rrd ask for the teacher's features in two forms; set nd.weight or rrd.weight to 0"
            )
        return self

    @property
    def active_terms(self) -> list[str]:
        """Names of the distillation terms with a weight above 0, in the order of the settings."""
        terms = {name: getattr(self, name) for name in type(self).model_fields}
        return [name for name, term in terms.items() if isinstance(term, Term) and term.weight > 0]

    @property
    def needs_teacher(self) -> bool:
        """True when any term needs soft targets."""
        return bool(self.active_terms)

    @property
    def needs_features(self) -> bool:
        """True when any term compares features, so that the student needs a projector."""
        return any(name in ("nd", "rrd") for name in self.active_terms)

    def label(self) -> str:
        """Returns a short name for tables, for instance `balanced_softmax+rrd+lrd`."""
        return "+".join([self.classification.name, *self.active_terms])
