"""The journal: what was decided for each normalization, and why. Reports print it.

A refusal is not an error. Each has a code of the registry `REFUSALS`, which holds its explanation
and a hint.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass, field


class Refusal(enum.Enum):
    """Why a rule, or the recognition of a norm, was refused; the value is what reports show."""

    # recognition
    NOT_A_NORM = "not-a-norm"
    FACTOR_ONLY = "factor-only"
    UNKNOWN_STATISTIC = "unknown-statistic"
    OTHER_DIMS = "reduction-over-other-dims"
    OTHER_TENSOR = "statistic-of-another-tensor"
    BROADCAST = "broadcast-axis-differs"
    VIEW_MIXES_DIMS = "view-mixes-dims"
    OPERATOR_LAW = "operator-law"
    SYMBOLIC_CORRECTION = "symbolic-correction"
    MUTATED = "mutation-between"
    GRAD_MODE = "grad-mode-differs"
    # rules
    EXTRA_USER = "extra-user"
    NOT_LINEAR = "reader-not-linear"
    NO_READER = "no-reader"
    NOT_LINEAR_BEFORE = "writer-not-linear"
    CHANNELS_MIXED = "channels-mixed"
    STATISTICS = "statistics-not-tracked"
    NEEDS_GRAD = "needs-grad"
    NOT_CONSTANT = "affine-not-constant"
    WEIGHT_NOT_CONSTANT = "weight-not-constant"
    DIM_NOT_LAST = "dim-not-last"
    PADDING = "zero-padding"
    SIGN = "sign-not-known"
    NOT_AFFINE = "no-affine"
    RULE_OFF = "rule-off"
    NOT_TRACKED = "weight-not-tracked"
    RANGE = "range-too-small"
    SCALE_UNKNOWN = "scale-not-known"
    CONDITION = "ill-conditioned"
    IN_BODY = "inside-a-body"
    STREAM_READ = "stream-read"
    POST_NORM = "post-norm-input"
    GATED = "gate-not-constant"
    OTHER_WIDTH = "other-width"
    DROPOUT = "active-dropout"
    AFFINE_BETWEEN = "affine-between"
    NOT_COMBINED = "statistics-not-combined"
    UNBOUNDED = "input-unbounded"
    CANCELS = "cancellation"
    NOT_WORTH = "not-worth-it"
    # bake
    BAKED = "weights-baked"
    NEUTRAL = "already-neutral"
    SHARED = "parameter-shared"
    COMPUTED = "parameter-computed"
    NO_BIAS = "reader-without-bias"
    NOT_CHOSEN = "site-not-chosen"
    NOT_PER_CHANNEL = "not-per-channel"
    NOT_MEASURED = "site-not-measured"
    # kernels
    NO_KERNEL = "no-kernel"
    SLOWER = "kernel-slower"
    NOT_TIMED = "kernel-not-timed"
    # convert
    ALREADY = "already-so"
    MORE_THAN_NORM = "more-than-a-norm"
    FURTHER_ARGUMENTS = "further-arguments"
    NO_STATISTIC = "no-statistic"
    NO_MODULE = "no-module"
    IS_THE_MODEL = "is-the-model"
    NEEDS_BATCH_NORM = "needs-batch-norm"
    # test time
    NO_IMAGE = "no-image"


@dataclass(frozen=True, slots=True)
class Explanation:
    """The registry entry of a refusal: what it means, and what a user can do about it."""

    meaning: str
    hint: str


REFUSALS: dict[Refusal, Explanation] = {
    Refusal.NOT_A_NORM: Explanation(
        "A statistic and its root were found, but no value made from them is a normalization.",
        "If this is a norm, compare it with the law table in docs/recognition.md.",
    ),
    Refusal.FACTOR_ONLY: Explanation(
        "Only 1/root of a statistic is made; it does not scale the tensor the statistic is of.",
        "Nothing to do; the graph runs unchanged.",
    ),
    Refusal.UNKNOWN_STATISTIC: Explanation(
        "A root is taken of what is no moment over fixed dims (a cumulative one, say).",
        "Nothing to do; the graph runs unchanged.",
    ),
    Refusal.OTHER_DIMS: Explanation(
        "The mean and the variance (or a second reduction) are taken over different dims.",
        "Take both over the same dims.",
    ),
    Refusal.OTHER_TENSOR: Explanation(
        "The statistic is of another tensor than the one that is scaled (a weighted one, say).",
        "Nothing to do if that is meant: it is not one of the norms normfx rewrites.",
    ),
    Refusal.BROADCAST: Explanation(
        "A statistic is broadcast along another axis than the one it belongs to.",
        "Use keepdim=True, or unsqueeze at the reduced dim.",
    ),
    Refusal.VIEW_MIXES_DIMS: Explanation(
        "A view between the statistic and its use merges or splits dims.",
        "View the input before the statistic is taken.",
    ),
    Refusal.OPERATOR_LAW: Explanation(
        "An operator on the way has no law that applies to these operands.",
        "The operators with laws are the table RULES in normfx/laws.py.",
    ),
    Refusal.SYMBOLIC_CORRECTION: Explanation(
        "An unbiased variance over a dim whose size is symbolic.",
        "Mark that dim static.",
    ),
    Refusal.MUTATED: Explanation(
        "A value of the region is written to in place between its first use and the norm's result.",
        "Use the out-of-place operator.",
    ),
    Refusal.GRAD_MODE: Explanation(
        "Part of the region is computed without gradients and part of it with.",
        "Compute all of it in the same grad mode.",
    ),
    Refusal.EXTRA_USER: Explanation(
        "What would change is read elsewhere too: by the output, a residual or another operator.",
        "The affine part must stay for that reader.",
    ),
    Refusal.NOT_LINEAR: Explanation(
        "A reader of the norm's result is not linear in it.",
        "Only linear readers can take the weight and bias over.",
    ),
    Refusal.NOT_LINEAR_BEFORE: Explanation(
        "What makes the norm's input is no linear operator or convolution, or of another dtype.",
        "Nothing to do; the norm stays.",
    ),
    Refusal.STATISTICS: Explanation(
        "Eager batch_norm in training mode changes running statistics without a trace of it.",
        'Pass options={"weights": "frozen"}, and call normfx.refold after they changed.',
    ),
    Refusal.CHANNELS_MIXED: Explanation(
        "The channels of the norm are not those that the operator before it makes.",
        "Nothing to do; the norm stays.",
    ),
    Refusal.NO_READER: Explanation("Nothing reads the norm's result.", "Nothing to do."),
    Refusal.NEEDS_GRAD: Explanation(
        "Gradients are wanted: the weights would be folded again in every step; that does not pay.",
        "Run inference under torch.no_grad() or inference_mode(), or freeze what is not trained.",
    ),
    Refusal.NOT_CONSTANT: Explanation(
        "The weight, bias or a statistic of the norm is computed from activations.",
        "Only parameters and buffers fold.",
    ),
    Refusal.WEIGHT_NOT_CONSTANT: Explanation(
        "The operator beside the norm multiplies with an activation, not with a parameter.",
        "Only parameters and buffers can take the scale over.",
    ),
    Refusal.DIM_NOT_LAST: Explanation(
        "The norm's weight does not run along the dim that the reader contracts.",
        "Nothing to do; the affine part stays.",
    ),
    Refusal.PADDING: Explanation(
        "A convolution pads the norm's result with zeros, where the bias would be missing.",
        "Pad with a value instead, or use a norm without bias.",
    ),
    Refusal.SIGN: Explanation(
        "ReLU or a maximum reads the norm, and its weight is not known to be at least zero.",
        "Make the weight of what is never negative: its exp, softplus or square.",
    ),
    Refusal.NOT_AFFINE: Explanation("The norm has no weight and no bias.", "Nothing to do."),
    Refusal.RULE_OFF: Explanation("The rule is switched off.", "See the option `rules`."),
    Refusal.RANGE: Explanation(
        "A reader's weight is float16: the product with the norm's weight could exceed its range.",
        "Use bfloat16 or float32.",
    ),
    Refusal.SCALE_UNKNOWN: Explanation(
        "A residual branch would be divided by the norm's scale, whose value is not at hand.",
        "Compile with the parameters themselves, and leave the rule `hoist` on.",
    ),
    Refusal.CONDITION: Explanation(
        "A residual branch would be divided by a scale that is zero, infinite or extreme.",
        "Nothing to do; the norm stays, and the next ones begin anew.",
    ),
    Refusal.IN_BODY: Explanation(
        "The norm is in the body of an operator (a checkpoint), where weights are operands.",
        "Run inference without the checkpoint.",
    ),
    Refusal.STREAM_READ: Explanation(
        "What the norm reads, or part of it, is also read by what sees its mean.",
        "Only norms over the same channels may read a residual stream that is centred.",
    ),
    Refusal.POST_NORM: Explanation(
        "The norm's input contains the result of another norm, which has a mean of its own.",
        "Nothing to do: the norm stays what it is in a post-norm block.",
    ),
    Refusal.GATED: Explanation(
        "A branch is multiplied by an activation for each channel, so its mean is not known.",
        "Nothing to do; the norm stays.",
    ),
    Refusal.OTHER_WIDTH: Explanation(
        "A norm that reads the stream takes its mean over other numbers than one row of channels.",
        "Nothing to do; the norms of this stream stay.",
    ),
    Refusal.DROPOUT: Explanation(
        "Dropout between a writer and the norm leaves a mean that changes with every call.",
        "Call model.eval().",
    ),
    Refusal.AFFINE_BETWEEN: Explanation(
        "The first of two norms has a weight or bias: the second sees no multiple of its result.",
        "Nothing to do; both norms stay.",
    ),
    Refusal.NOT_COMBINED: Explanation(
        "Two norms are no single one, by their statistics, eps, or the rounding between them.",
        "Nothing to do; both norms stay.",
    ),
    Refusal.UNBOUNDED: Explanation(
        "The input of a norm with a large eps has no known bound, so its statistic may matter.",
        "Bound it (tanh, clamp), or take the norm out of the model.",
    ),
    Refusal.CANCELS: Explanation(
        "A mean or a bias would be added to a product that is rounded already: they may cancel.",
        "Nothing to do; the norm stays as it is.",
    ),
    Refusal.NOT_WORTH: Explanation(
        "Legal, but the cost model expects no gain.",
        "See docs/rewrites.md for what it costs.",
    ),
    Refusal.BAKED: Explanation(
        "The model was baked, so that no weight has a second copy; centring would make one.",
        "Name `recentre` in the option `rules` to have it all the same.",
    ),
    Refusal.NEUTRAL: Explanation(
        "The norm's weight is one and its bias zero already.",
        "Nothing to do.",
    ),
    Refusal.SHARED: Explanation(
        "A parameter that would change is read elsewhere too, or is tied to another one.",
        "Compile instead: a reader then gets a copy. Or untie the weight with `clone=True`.",
    ),
    Refusal.COMPUTED: Explanation(
        "What would change is no entry of the state dict, or is computed, or has no neutral value.",
        "Remove the parametrization first, or compile instead.",
    ),
    Refusal.NO_BIAS: Explanation(
        "The norm has a bias, and an operator that would take it over has none.",
        "Compile instead: the operator then gets one, beside the state dict.",
    ),
    Refusal.NOT_CHOSEN: Explanation(
        "The norm is not among those that its calibrated statistics may replace.",
        "See the option `sites`.",
    ),
    Refusal.NOT_PER_CHANNEL: Explanation(
        "The norm's statistics are not over one dim of channels (or all others): groups, a gate.",
        "Nothing to do; the norm stays.",
    ),
    Refusal.NOT_MEASURED: Explanation(
        "The statistics say why this norm could not be measured by itself.",
        "See `Statistics.refused`.",
    ),
    Refusal.ALREADY: Explanation("The norm is of the kind that was asked for.", "Nothing to do."),
    Refusal.MORE_THAN_NORM: Explanation(
        "The module computes more than one norm of its input, or another one in training mode.",
        "Make the norm a module of its own.",
    ),
    Refusal.FURTHER_ARGUMENTS: Explanation(
        "The module computes a norm, but takes further arguments, of which no layer knows.",
        "Give its forward method one argument.",
    ),
    Refusal.NO_STATISTIC: Explanation(
        "The module is a constant affine map: it takes no statistic of its input.",
        "Nothing to do; a compilation folds it.",
    ),
    Refusal.NO_MODULE: Explanation(
        "The norm is computed inside of a module that computes more; only modules are swapped.",
        "Make the norm a module of its own, or compile with the option `statistics`.",
    ),
    Refusal.IS_THE_MODEL: Explanation(
        "The norm is the whole model, so there is nothing that it could be swapped in.",
        "Wrap it: torch.nn.Sequential(norm).",
    ),
    Refusal.NEEDS_BATCH_NORM: Explanation(
        "Only a BatchNorm of torch with running statistics can become a layer of this kind.",
        "Train with BatchNorm, or convert to another kind.",
    ),
    Refusal.NO_IMAGE: Explanation(
        "UnMix-TNS adapts the BatchNorms of images (batch, channels, height, width) only.",
        "Nothing to do: it keeps its trained statistics, as in the released code.",
    ),
    Refusal.NO_KERNEL: Explanation(
        "No Triton kernel computes this norm, at its sizes, dtypes and on its device.",
        "Nothing to do: Inductor generates code for it. See docs/kernels.md.",
    ),
    Refusal.SLOWER: Explanation(
        "A Triton kernel was timed on this device, and is not faster than Inductor's code.",
        "Nothing to do: the faster one is used.",
    ),
    Refusal.NOT_TIMED: Explanation(
        "Nobody has timed the Triton kernel for this norm yet, or the attempt failed.",
        "Compile the model: only a compilation measures.",
    ),
    Refusal.NOT_TRACKED: Explanation(
        "A parameter was made in inference mode, so changes to it cannot be noticed.",
        'Build the model outside of inference mode, or pass options={"weights": "frozen"}.',
    ),
}


@dataclass(frozen=True, slots=True)
class Record:
    """One decision: a rule changed a site, or was refused.

    Attributes:
        stage: the stage that decided.
        rule: the rule's name (kebab-case).
        changed: whether the rule was applied.
        code: why not, if it was not.
        node: the name of the guilty node, if one is known.
        location: `file:line` of the user's line, or "".
        detail: one line for people.
    """

    stage: str
    rule: str
    changed: bool
    code: Refusal | None = None
    node: str = ""
    location: str = ""
    detail: str = ""


@dataclass(slots=True)
class Site:
    """One normalization of a model: one call, however it is spelled.

    Attributes:
        name: the module path where there is one, else the name of the function or node.
        kind: the usual name ("LayerNorm", "RMSNorm", ...).
        dims: what the statistics are taken over: from the end (-1) where they are trailing, else
            from the front.
        eps: the number as written, or None (a tensor, or the default of the dtype).
        dtype: of the input.
        location: `file:line` of the user's line, or "".
        weight: whether it has a factor.
        bias: whether it has a summand.
        groups: how many groups a dim of `dims` is split into; 0: no groups.
        origin: the ATen operator, or "algebra" for a spelled-out one.
        on_weight: whether it normalizes a parameter (weight standardization, weight norm).
        number: which of the norms of its name in the graph it is; 0: the first.
        records: every decision about it, in order.
    """

    name: str
    kind: str
    dims: tuple[int, ...]
    eps: float | None
    dtype: str
    location: str
    weight: bool = False
    bias: bool = False
    groups: int = 0
    origin: str = "algebra"
    on_weight: bool = False
    number: int = 0
    records: list[Record] = field(default_factory=list)

    @property
    def key(self) -> str:
        """The name, with a number from the second of its name on: `norm#1`, as `skip` has it."""
        return f"{self.name}#{self.number}" if self.number else self.name

    @property
    def actions(self) -> list[str]:
        """The names of the rules that were applied, in order."""
        return [r.rule for r in self.records if r.changed and r.stage != "recognise"]

    @property
    def refusals(self) -> list[str]:
        """The codes of the rules that were refused, in order, each once."""
        return list(dict.fromkeys(r.code.value for r in self.records if r.code is not None))


@dataclass(slots=True)
class NearMiss:
    """A statistic with a root that is no normalization: the first law that failed, and where."""

    name: str
    code: Refusal
    location: str
    node: str
    detail: str = ""


@dataclass(slots=True)
class Journal:
    """What happened to one graph.

    Attributes:
        name: "graph 0", "graph 1", ... in the order of compilation.
        sites: the normalizations found.
        near_misses: what looked like one and is not.
        stages: seconds spent in each stage.
        nodes: how many nodes the captured graph has.
        folded_bytes: memory that hoisted and folded tensors take beside the originals.
        hoisted: how many tensors are computed outside of the graph.
        fallback: why the graph was left to Inductor, or "".
        training: whether the graph is differentiated.
    """

    name: str = "graph"
    sites: list[Site] = field(default_factory=list)
    near_misses: list[NearMiss] = field(default_factory=list)
    stages: dict[str, float] = field(default_factory=dict)
    nodes: int = 0
    folded_bytes: int = 0
    hoisted: int = 0
    fallback: str = ""
    training: bool = False

    def abandon(self, cause: str) -> None:
        """Forgets what was decided, since the graph is left to Inductor as it was."""
        self.fallback = cause
        self.sites, self.near_misses = [], []
        self.hoisted = self.folded_bytes = 0
