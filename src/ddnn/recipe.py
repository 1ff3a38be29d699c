"""A recipe says what a run is: typed, frozen, strict about unknown keys. TOML file + ``key=value`` overrides.

A run depends on nothing but its recipe, its data and the versions installed. Every field has a default, so a
recipe file holds what makes it different; the run folder keeps the resolved recipe, with every field written out.
"""

import difflib
import tomllib
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal, Self, get_args

import tomli_w
from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag, ValidationError, model_validator

from ddnn.errors import RecipeError
from ddnn.policies import AttentionMap, HeadPolicy, Labels, NormPolicy

Fraction = Annotated[float, Field(ge=0, lt=1)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NonNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Weight = Annotated[
    Annotated[NonNegative, Tag("one")] | Annotated[dict[str, NonNegative], Tag("by name")],
    Discriminator(lambda given: "by name" if isinstance(given, dict) else "one"),
]
Share = Annotated[float, Field(ge=0, le=1)]
Count = Annotated[int, Field(ge=1)]
Depths = tuple[Count, ...]
Scalar = bool | int | float | str
Option = Scalar | list[Scalar]


def largest(weight: Weight) -> float:
    """Of a weight of the objective, the largest that a net has."""
    return max(weight.values(), default=0.0) if isinstance(weight, dict) else weight


class Section(BaseModel):
    """A part of a recipe: frozen, and an unknown key is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


class Data(Section):
    """Where the images come from and how they are split."""

    source: str = "digits"
    """`digits` (embedded), `cifar10`, `cifar100`, a folder (class folders, parquet files or tar shards), here or at a
    URL such as `s3://bucket/folder`, shards such as `train-{000..146}.tar`, or a Hugging Face hub id. A name found as a
    folder in `$DDNN_DATA` is taken from there."""
    image_column: str | None = None
    """Column with the images of a parquet or hub data set; found by type if not named."""
    label_column: str | None = None
    """Column with the class labels, or their key in the `.json` of tar shards; found by type or name if not named."""
    shuffle: Literal["global", "chunks"] = "global"
    """Order of an epoch: of all images; or `chunks`, for parquet files and tar shards whose images are slow to reach
    one by one: those that lie beside each other are read at once, and mixed with `shuffle_window` others."""
    shuffle_window: Annotated[int, Field(ge=32)] = 8192
    """Images that are mixed at a time with `chunks`. Every worker holds up to twice as many in memory, encoded."""
    image_size: Annotated[int, Field(ge=4, le=1024)] | None = None
    """Side in pixels of the square images given to the network; if not given, it follows from the data."""
    zoom: Annotated[float, Field(ge=1, le=2)] = 1.0
    """Evaluation resizes the shorter side to this many times the image size before the centre crop; 1.14 is usual
    with `augment.crop=resized`."""
    validation: Fraction = 0.1
    """Share of the training images set aside to judge hyper-parameters; 0 trains on all of them. A validation split of
    the data set's own, beside a test split, is used instead."""
    test: Fraction = 0.2
    """Share of the images kept for the test, only where the data set has no test split of its own."""
    limit: Count | None = None
    """Use no more than this many images of each part (training, validation, test): for trying things out."""
    corrupt_limit: Annotated[int, Field(ge=0)] = 10
    """How many unreadable images are skipped, each reported by path, before they are an error."""
    memory_mb: Annotated[int, Field(ge=0)] = 2048
    """Sets whose decoded images fit in this many MiB are held in memory; larger ones are decoded by workers."""
    workers: Annotated[int, Field(ge=0, le=256)] = 2
    """Processes that decode images of a set that is not held in memory, or augment them one by one."""

    def shorter_side(self, image_size: int) -> int:
        """To how many pixels evaluation resizes the shorter side of an image before it cuts out the middle."""
        return round(image_size * self.zoom)


class Augment(Section):
    """Changes made to training images."""

    crop: Literal["pad", "resized", "none"] = "pad"
    """`pad`: a random square of the padded image; `resized`: a random area and shape, resized (ImageNet's)."""
    padding: Annotated[int, Field(ge=0)] | None = None
    """Pixels of zero padding for `pad`; an eighth of the image size if not given."""
    flip: bool = True
    """Mirror half of the images left to right."""
    policy: Literal["none", "trivialaugment", "randaugment", "autoaugment"] = "none"
    """A stronger augmentation of torchvision, image by image."""
    erasing: Fraction = 0.0
    """Probability of blanking a random rectangle."""
    mixup: NonNegative = 0.0
    """Beta parameter of mixup; 0 is off. With cutmix on too, each batch takes one of the two."""
    cutmix: NonNegative = 0.0
    """Beta parameter of cutmix; 0 is off."""


class Network(Section):
    """The full-net and the sub-nets nested in it."""

    name: str = "cifar-resnet8-14-20"
    """A preset (`ddnn recipes --presets` lists them), or a full-net as `cifar/resnet20`, `torchvision/NAME`,
    `timm/NAME`."""
    subnets: dict[str, Depths | dict[str, Count]] | None = None
    """Blocks kept per stage by name of the sub-net, `[2, 2, 2]` or `{layer3 = 2}`; replaces the preset's table.
    `ddnn suggest` proposes some."""
    stages: tuple[str, ...] | None = None
    """Names of the stages, such as `["layer1", "blocks[0:4]"]`, where a network's own division does not suit."""
    options: dict[str, Option] = {}
    """Given to the library's function that makes the network, such as `{drop_path_rate = 0.1}`."""
    width: Count = 16
    """Channels of the first stage; CIFAR ResNets only."""
    norm: NormPolicy = "private"
    """Normalisation layers after two paths have diverged: one per path, one for all, or one for all with the
    running statistics recomputed per sub-net after training."""
    head: HeadPolicy = "shared"
    """Classifier: one for all nets, or one per net."""
    alone: str | None = None
    """Train only this net of the table, by itself; `ddnn compare` uses it for its baselines."""
    weights: Path | None = None
    """The full-net's weights to start from: a safetensors or `weights_only` PyTorch file with the library's names, or
    a run folder (or its `model.safetensors`), of which the full-net is taken. A relative path starts at the run's own
    folder, or where the command is given."""
    fresh_classifier: bool = False
    """Whether `weights` trained for other classes are taken without their classifier, which then starts fresh."""
    pretrained: bool = False
    """Start from the weights that torchvision or timm offers for this network, which they download; the classifier
    is fresh where it has another number of classes."""

    @model_validator(mode="after")
    def _starts_from_one_place(self) -> Self:
        if self.pretrained and self.weights is not None:
            raise ValueError("pretrained=true and weights both say what to start from; leave one out")
        if self.fresh_classifier and self.weights is None:
            raise ValueError("fresh_classifier=true is about weights; give weights=FILE, or leave it out")
        return self

    def seen_from(self, folder: Path) -> "Network":
        """The same network with weights that a run folder names from there."""
        return self if self.weights is None else self.model_copy(update={"weights": folder / self.weights})

    def unweighted(self) -> "Network":
        """The same network with fresh weights."""
        return self.model_copy(update={"weights": None, "fresh_classifier": False, "pretrained": False})


class Objective(Section):
    """Embedded knowledge distillation (EKD): what the sub-nets learn from labels and from the full-net."""

    temperature: Positive = 3.0
    """T: softens both posteriors in the KL term."""
    kl: Weight = 1.0
    """lambda_kl: weight of the KL divergence from the full-net's class posteriors, one number for all sub-nets or one
    by name; 0 leaves the term out."""
    attention: Weight = 1.0
    """lambda_at: weight of the attention distance at features of the same resolution, likewise."""
    attention_map: AttentionMap = "power"
    """`power`: sum over channels of squares, unit length; `softmax`: its spatial softmax (Hou et al. 2019)."""
    subnet_weight: Weight = 1.0
    """w_k: weight of all terms of a sub-net, likewise; the full-net's weight is 1."""
    labels: Labels = "all"
    """Which nets learn from the labels: all, or the full-net only, the sub-nets then by distillation alone."""
    ramp: tuple[Share, Share] = (0.0, 0.0)
    """Shares of the run: distillation is off before the first, whole from the second on, and rises evenly between. Not
    needed after a `train.full_net_share`: that full-net knows enough to teach at once."""
    teacher: Path | None = None
    """Run folder of a finished run whose full-net teaches all nets here, instead of this run's own (two-model KD)."""
    label_smoothing: Share = 0.0
    """Share of the label's probability that is spread over all classes."""

    @property
    def distils(self) -> bool:
        """Whether a sub-net is taught by more than labels."""
        return largest(self.kl) > 0 or largest(self.attention) > 0

    @model_validator(mode="after")
    def _ramp_rises(self) -> Self:
        if self.ramp[0] > self.ramp[1]:
            raise ValueError(
                f"ramp={list(self.ramp)} ends before it begins; the second share must not be below the first"
            )
        if self.ramp[1] > 0 and self.labels == "full-net":
            raise ValueError("ramp leaves sub-nets without labels nothing to learn from at first; set ramp=[0, 0]")
        if self.teacher is not None and self.labels == "full-net":
            raise ValueError("labels=full-net leaves no net with labels where teacher is set; set labels=all")
        return self


class Optim(Section):
    """The optimiser."""

    name: Literal["sgd", "adamw"] = "sgd"
    """Stochastic gradient descent with momentum, or AdamW."""
    lr: Positive = 0.2
    """Peak learning rate."""
    momentum: Fraction = 0.9
    """SGD only."""
    nesterov: bool = True
    """SGD only."""
    betas: tuple[Fraction, Fraction] = (0.9, 0.999)
    """AdamW only."""
    weight_decay: NonNegative = 5e-4
    """Never applied to normalisation layers and biases."""
    clip_norm: Positive | None = None
    """Longest gradient let through, as a norm over all parameters."""

    @model_validator(mode="after")
    def _nesterov_needs_momentum(self) -> Self:
        if self.name == "sgd" and self.nesterov and self.momentum == 0:
            raise ValueError("nesterov needs momentum above 0; set nesterov=false or momentum=0.9")
        return self


class Schedule(Section):
    """The learning rate over the run."""

    name: Literal["cosine", "onecycle", "multistep", "constant"] = "onecycle"
    """From the peak down along half a cosine; up to it and down again; down in steps; always at the peak."""
    warmup_epochs: NonNegative = 0.0
    """Linear warm-up before `cosine`, `multistep` and `constant`; one-cycle has its own (`rise`)."""
    rise: Annotated[float, Field(gt=0, lt=1)] = 0.25
    """One-cycle only: share of the run in which the rate rises."""
    milestones: tuple[Annotated[float, Field(gt=0, lt=1)], ...] = (0.5, 0.75)
    """Multi-step only: shares of the run after which the rate is multiplied by `gamma`."""
    gamma: Annotated[float, Field(gt=0, lt=1)] = 0.1
    """Multi-step only."""


class Train(Section):
    """The loop."""

    epochs: Count = 12
    """Passes over the training images."""
    full_net_share: Fraction = 0.0
    """Share of the epochs, at the beginning, that is the full-net's alone. Its sub-nets then join it, starting from its
    weights, norms and classifier. With 0 all nets begin together."""
    alone_share: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Epochs of a net that is trained by itself (`network.alone`, and in comparisons), as a share of `epochs`. A step
    of all nets costs less than a step of each; below 1 this gives nets alone fewer epochs, so that both sides of a
    comparison do equal work."""
    batch_size: Count = 128
    """Images per optimiser step."""
    accumulate: Count = 1
    """Parts a batch is cut into, one after the other, to save memory; batch norms see one part at a time."""
    eval_batch_size: Count = 500
    """Images at a time in evaluation."""
    seed: Annotated[int, Field(ge=0)] = 0
    """Of fresh weights, the order of the images and their augmentation. The split of the data is the same for all."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """`auto`: a GPU where there is one."""
    threads: Count | None = None
    """CPU threads of the training; all cores if not given. A sum split among other threads is rounded differently."""
    precision: Literal["auto", "float32", "bf16", "float64"] = "float32"
    """`bf16`: autocast of matrix products and convolutions; losses stay in float32. A CPU needs instructions for it,
    x86 AVX-512. `auto`: `bf16` where the machine that the run is made on is fast in it, else `float32`; the run keeps
    which. `float64`, slow, is for checks."""
    channels_last: bool = True
    """Memory layout of images and features; the faster one for convolutions, nearly everywhere."""
    compile: bool = False
    """`torch.compile` of the forward; not with `lean`. On a CPU a step then takes 4 to 30 % less, after a minute
    (ResNet-8/14/20) or more of compiling, for which it needs g++."""
    lean: bool = False
    """Go forward and backward through one path at a time: about the memory of the full-net alone."""
    ema: Fraction = 0.0
    """Decay per step of a moving average of the weights, which is then what is evaluated and kept; 0 is off."""
    deterministic: bool = True
    """Repeat bitwise on one machine, on a GPU too, where this costs some speed."""
    checkpoint_minutes: NonNegative = 5.0
    """A checkpoint is written after every epoch, and within an epoch when this much time has passed."""
    checkpoint_steps: Count | None = None
    """Within an epoch, write a checkpoint also after so many steps: as many are repeated at most after a fault."""
    sync_norm: bool = True
    """Several processes only: batch norms see the images of all processes together. If not, each sees its own."""
    patience_minutes: Positive = 5.0
    """Several processes only: how long one waits for another before it ends the training."""

    @property
    def full_net_epochs(self) -> int:
        """Epochs of the full-net by itself."""
        return min(round(self.full_net_share * self.epochs), self.epochs - 1)

    @property
    def alone_epochs(self) -> int:
        """Epochs of a net that is trained by itself."""
        return max(round(self.alone_share * self.epochs), 1)

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        if self.batch_size % self.accumulate:
            raise ValueError(f"accumulate={self.accumulate} does not divide batch_size={self.batch_size}")
        if self.batch_size == self.accumulate:
            part = "is" if self.accumulate == 1 else f"and accumulate={self.accumulate} leave"
            raise ValueError(f"batch_size={self.batch_size} {part} one image a part, too few for batch norm")
        if self.compile and self.lean:
            raise ValueError(
                "compile=true and lean=true exclude each other, one for time, one for memory; leave one out"
            )
        return self


class Recipe(Section):
    """Everything a run depends on, besides its data and the versions installed."""

    data: Data = Data()
    augment: Augment = Augment()
    network: Network = Network()
    objective: Objective = Objective()
    optim: Optim = Optim()
    schedule: Schedule = Schedule()
    train: Train = Train()

    @model_validator(mode="after")
    def _sub_nets_learn_something(self) -> Self:
        if self.objective.labels == "full-net" and not self.objective.distils:
            raise ValueError("objective.labels=full-net needs objective.kl or objective.attention above 0")
        return self

    @model_validator(mode="after")
    def _warmup_fits(self) -> Self:
        if self.schedule.warmup_epochs >= self.train.alone_epochs:
            alone = "" if self.train.alone_share == 1 else f", of which a net alone has {self.train.alone_epochs}"
            raise ValueError(
                f"schedule.warmup_epochs={self.schedule.warmup_epochs:g} must be below "
                f"train.epochs={self.train.epochs}{alone}"
            )
        return self

    def to_toml(self) -> str:
        """The whole recipe as TOML, every field written out (a field that is off, None, is left out)."""
        return tomli_w.dumps(self.model_dump(mode="json", exclude_none=True))


def shipped() -> dict[str, str]:
    """The recipes that come with ddnn: name -> text of the file."""
    folder = resources.files("ddnn") / "recipes"
    files = sorted((f for f in folder.iterdir() if f.name.endswith(".toml")), key=lambda f: f.name)
    return {f.name.removesuffix(".toml"): f.read_text(encoding="utf-8") for f in files}


def load(recipe: str | Path = "digits", overrides: tuple[str, ...] | list[str] = ()) -> Recipe:
    """Read a recipe by shipped name or from a TOML file and apply overrides such as ``optim.lr=0.1``.

    An override's value is read as TOML (``0.1``, ``true``, ``[1, 1, 1]``) and as plain text where it is not TOML.
    Raises `RecipeError` that lists every mistake with its place and what is allowed there.
    """
    tree, place = _tree(*_read(recipe))
    for override in overrides:
        _apply(tree, override)
    return _placed(parse(tree, place), Path(recipe).parent)


def reopen(path: Path) -> Recipe:
    """The resolved recipe that a run folder or a comparison keeps, to the letter; `RecipeError` if it is damaged."""
    return parse(*_tree(*_read(path)))


def _tree(text: str, place: str) -> tuple[dict[str, Any], str]:
    """A recipe's text as nested dictionaries, and again the place it is from."""
    try:
        return tomllib.loads(text), place
    except tomllib.TOMLDecodeError as error:
        raise RecipeError(f"{place} is not valid TOML: {error}") from None


def changed(recipe: Recipe, **sections: dict[str, Any]) -> Recipe:
    """The recipe with some fields of some sections changed."""
    parts = {name: getattr(recipe, name).model_copy(update=fields) for name, fields in sections.items()}
    return recipe.model_copy(update=parts)


def validate(recipe: Recipe, place: str) -> None:
    """Raise `RecipeError` where what `changed` has made does not fit together; `place` is where it says that is."""
    parse(recipe.model_dump(), place)


def by_itself(recipe: Recipe) -> Recipe:
    """With as many epochs as a net has that is trained by itself."""
    train = {"epochs": recipe.train.alone_epochs, "full_net_share": 0.0, "alone_share": 1.0}
    return changed(recipe, train=train)


def _placed(recipe: Recipe, folder: Path) -> Recipe:
    """With paths that are there made absolute, so that a run can be gone on with from another working folder.

    `folder` is where the recipe's file lies: a run folder names its teacher and its weights from there.
    """
    changes: dict[str, dict[str, Any]] = {}
    source = Path(recipe.data.source).expanduser()
    shards = source.suffix in (".tar", ".parquet") and source.parent.is_dir()  # perhaps with braces: {000..146}
    if recipe.data.source not in ("", "digits") and (shards or source.is_dir()):
        changes["data"] = {"source": str(source.resolve())}
    if recipe.network.weights is not None:
        changes["network"] = {"weights": _place(recipe.network.weights, folder)}
    if recipe.objective.teacher is not None:
        changes["objective"] = {"teacher": _place(recipe.objective.teacher, folder)}
    return changed(recipe, **changes)


def _place(path: Path, folder: Path) -> Path:
    given = path.expanduser()
    beside = folder / given
    return (beside if beside.exists() else given).resolve()


def parse(tree: dict[str, Any], place: str = "recipe") -> Recipe:
    """Make a recipe from nested dictionaries; `place` is where an error says it is."""
    try:
        return Recipe.model_validate(tree)
    except ValidationError as error:
        wrong: dict[tuple[str, str], list[str]] = {}
        for one in error.errors():
            where, what, given = _explain(dict(one), tree)
            wrong.setdefault((where, given), []).append(what)
        # a value that may be of several kinds is wrong once, whatever each of them says to it
        lines = [f"{where}: {', or '.join(whats)}{given}" for (where, given), whats in wrong.items()]
        count = "1 mistake" if len(lines) == 1 else f"{len(lines)} mistakes"
        raise RecipeError("\n  ".join([f"{place}: {count}", *lines])) from None


def _read(recipe: str | Path) -> tuple[str, str]:
    ours = shipped()
    if str(recipe) in ours:
        return ours[str(recipe)], f"recipe {recipe}"
    path = Path(recipe)
    try:
        return path.read_text(encoding="utf-8"), str(path)
    except (OSError, UnicodeDecodeError) as error:
        what = "not a text file" if isinstance(error, UnicodeDecodeError) else error.strerror
        names = ", ".join(ours)
        raise RecipeError(f"no recipe {recipe}: {what}; give a TOML file or one of: {names}") from None


def _apply(tree: dict[str, Any], override: str) -> None:
    """Write one ``a.b=value`` into the nested dictionaries."""
    dotted, equals, text = override.partition("=")
    keys = dotted.strip().split(".")
    if not equals or not all(keys):
        raise RecipeError(f"override {override!r} is not of the form section.key=value, such as optim.lr=0.1")
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = text.strip()
    if text.strip().lower() == "none" and _may_be_none(keys):
        value = None
    node = tree
    for key in keys[:-1]:
        node = node.setdefault(key, {})
        if not isinstance(node, dict):
            raise RecipeError(f"override {override!r}: {key} holds a value, not a section")
    node[keys[-1]] = value


def _may_be_none(keys: list[str]) -> bool:
    """Whether `none` stands for no value at this place; for some fields it is a value like others."""
    section: Any = Recipe
    for key in keys:
        field = getattr(section, "model_fields", {}).get(key)
        if field is None:
            return False
        section = field.annotation
    return type(None) in get_args(section)


def _explain(error: dict[str, Any], tree: dict[str, Any]) -> tuple[str, str, str]:
    """Of one mistake: dotted place, what is wrong there and what is allowed, and what is given."""
    # pydantic puts the branch of a union into the place too ("float", "dict[str,...]"); it means nothing to a user.
    loc: list[str] = []
    for part in error["loc"]:
        if isinstance(part, int) or _holds(tree, [*loc, part]) or error["type"] == "missing":
            loc.append(str(part))
    place = ".".join(loc) or "recipe"
    if error["type"] == "extra_forbidden":
        allowed = _keys_beside(loc)
        close = difflib.get_close_matches(loc[-1], allowed, n=1, cutoff=0.6)
        hint = f"did you mean {close[0]}? " if close else ""
        return place, f"unknown key; {hint}allowed here: {', '.join(allowed)}", ""
    message = error["msg"].removeprefix("Value error, ")
    message = message[0].lower() + message[1:]
    given = "" if isinstance(error["input"], (dict, BaseModel)) else f" (given: {error['input']!r})"
    return place, message, given


def _holds(tree: Any, keys: list[str]) -> bool:
    for key in keys:
        if not isinstance(tree, dict) or key not in tree:
            return False
        tree = tree[key]
    return True


def _keys_beside(loc: list[str]) -> list[str]:
    """The keys allowed where the last one of `loc` stands."""
    section: Any = Recipe
    for key in loc[:-1]:
        annotation = section.model_fields[key].annotation
        section = next(a for a in (annotation, *get_args(annotation)) if isinstance(a, type) and issubclass(a, Section))
    return list(section.model_fields)
