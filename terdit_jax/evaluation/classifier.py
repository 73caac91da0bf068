"""A small convolutional classifier of images, trained in seconds: its labels and features judge generated images.

Where the images come from and what is computed from its answers is left to others.
"""

from functools import partial

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import optax

from terdit_jax.batches import fill_up
from terdit_jax.errors import UserError
from terdit_jax.labels import check_labels
from terdit_jax.reproducible import make_key, pinned

FEATURES = 64
BATCH_SIZE = 128
LEARNING_RATE = 2e-3  # at the start of a cosine to 0
DROPOUT = 0.5  # of the flattened convolutions, while training

Params = dict  # nested, of float32 arrays


class Network(nnx.Module):
    """3x3 convolutions that halve the image while its shorter side is at least 8, one hidden layer, and logits."""

    def __init__(self, height: int, width: int, channels: int, num_classes: int, rngs: nnx.Rngs):
        convs = [nnx.Conv(channels, 32, (3, 3), rngs=rngs)]
        while min(height, width) >= 8:
            convs.append(nnx.Conv(convs[-1].out_features, 64, (3, 3), strides=2, rngs=rngs))
            height, width = -(-height // 2), -(-width // 2)
        self.convs = nnx.List(convs)
        self.hidden = nnx.Linear(height * width * convs[-1].out_features, FEATURES, rngs=rngs)
        self.head = nnx.Linear(FEATURES, num_classes, rngs=rngs)

    def __call__(self, x: jax.Array, dropout_key: jax.Array | None = None) -> tuple[jax.Array, jax.Array]:
        """Images (B, H, W, C) in [-1, 1] to features (B, 64) and logits (B, K); no dropout without a key."""
        for conv in self.convs:
            x = jax.nn.relu(conv(x))
        x = x.reshape(len(x), -1)
        if dropout_key is not None:
            x = x * jax.random.bernoulli(dropout_key, jnp.float32(1 - DROPOUT), x.shape) / (1 - DROPOUT)
        features = jax.nn.relu(self.hidden(x))
        return features, self.head(features)


class Classifier:
    """A trained network; answers on the host."""

    def __init__(self, graph: nnx.GraphDef, params: Params):
        self._graph, self.params = graph, params

    def features(self, images: np.ndarray, batch_size: int = BATCH_SIZE) -> np.ndarray:
        """Images (N, H, W, C) float32 in [-1, 1] to the hidden layer's activations (N, 64) float32."""
        return self._batched(images, batch_size)[0]

    def logits(self, images: np.ndarray) -> np.ndarray:
        """Images (N, H, W, C) float32 in [-1, 1] to logits (N, K) float32."""
        return self._batched(images)[1]

    def _batched(self, images: np.ndarray, batch_size: int = BATCH_SIZE) -> tuple[np.ndarray, np.ndarray]:
        answers = []
        for start in range(0, len(images), batch_size):
            batch = images[start : start + batch_size]
            answer = _apply(self._graph, self.params, fill_up(batch, batch_size))
            answers.append([np.asarray(rows)[: len(batch)] for rows in answer])
        features, logits = zip(*answers, strict=True)
        return np.concatenate(features), np.concatenate(logits)


def make_classifier(shape: tuple[int, int, int], num_classes: int, params: Params) -> Classifier:
    """A classifier of images of a shape (H, W, C) from the `params` of one that was trained elsewhere."""
    return Classifier(nnx.split(Network(*shape, num_classes, nnx.Rngs(0)))[0], params)


@pinned()
def train_classifier(
    images: np.ndarray, labels: np.ndarray, num_classes: int, seed: int = 0, num_steps: int = 400
) -> Classifier:
    """Trains on images (N, H, W, C) float32 in [-1, 1] with labels (N,) in [0, num_classes).

    AdamW on batches of 128 drawn with replacement; the seed decides the start, the batches and the dropout.

    Raises:
        UserError: no images, counts that differ, or a label out of range.
    """
    if images.ndim != 4 or not len(images) or labels.shape != images.shape[:1]:
        raise UserError(f"images {images.shape} with labels {labels.shape}: expected (N, H, W, C) and (N,), N above 0")
    check_labels(labels, num_classes, owner="the classifier")

    _, height, width, channels = images.shape
    graph, state = nnx.split(Network(height, width, channels, num_classes, nnx.Rngs(seed)))
    params = nnx.to_pure_dict(state)
    opt_state = _make_optimizer(num_steps).init(params)
    rng, key = np.random.default_rng(seed), make_key(seed)
    for step in range(num_steps):
        batch, dropout_key = rng.integers(len(images), size=BATCH_SIZE), jax.random.fold_in(key, step)
        params, opt_state = _train_step(graph, num_steps, params, opt_state, images[batch], labels[batch], dropout_key)
    return Classifier(graph, params)


def _make_optimizer(num_steps: int) -> optax.GradientTransformation:
    return optax.adamw(optax.cosine_decay_schedule(LEARNING_RATE, num_steps))


@partial(jax.jit, static_argnums=0)
def _apply(graph: nnx.GraphDef, params: Params, images: jax.Array) -> tuple[jax.Array, jax.Array]:
    return nnx.merge(graph, params)(images)


@partial(jax.jit, static_argnums=(0, 1))
def _train_step(
    graph: nnx.GraphDef,
    num_steps: int,
    params: Params,
    opt_state: optax.OptState,
    images: jax.Array,  # B, H, W, C
    labels: jax.Array,  # B
    dropout_key: jax.Array,
) -> tuple[Params, optax.OptState]:
    def mean_loss(params: Params) -> jax.Array:
        _, logits = nnx.merge(graph, params)(images, dropout_key)
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    updates, opt_state = _make_optimizer(num_steps).update(jax.grad(mean_loss)(params), opt_state, params)
    return optax.apply_updates(params, updates), opt_state
