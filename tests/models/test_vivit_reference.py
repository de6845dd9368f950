"""ViViT's models 2, 3 and 4 against plain implementations of their formulas (arXiv 2103.15691, §3.3).

The references loop over samples, times, places and heads, and use nothing of the product but its weights.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from video_models import make, pixels, shake

from framework.models import InputSpec

TIMES, PLACES, WIDTH, HEADS, DEPTH = 4, 16, 32, 4, 2
INPUTS = {"clips": InputSpec("video", 8, 32, 5)}
State = dict[str, Tensor]


def dense(state: State, name: str, vector: Tensor) -> Tensor:
    return state[f"{name}.weight"] @ vector + state[f"{name}.bias"]


def norm(state: State, name: str, vector: Tensor) -> Tensor:
    centred = vector - vector.mean()
    return centred / (centred.square().mean() + 1e-6).sqrt() * state[f"{name}.weight"] + state[f"{name}.bias"]


def mlp(state: State, name: str, vector: Tensor) -> Tensor:
    hidden = dense(state, f"{name}.fc1", vector)
    inner = math.sqrt(2 / math.pi) * (hidden + 0.044715 * hidden**3)
    return dense(state, f"{name}.fc2", 0.5 * hidden * (1 + inner.tanh()))


def tokens_of(state: State, clip: Tensor) -> list[list[Tensor]]:
    """Tubelets of 2 frames and 8 x 8 pixels, one product each: [time][place]."""
    kernel, bias = state["tokenizer.tubes.0.weight"], state["tokenizer.tubes.0.bias"]
    tokens = []
    for time in range(TIMES):
        row = []
        for y in range(4):
            for x in range(4):
                box = clip[:, 2 * time : 2 * time + 2, 8 * y : 8 * y + 8, 8 * x : 8 * x + 8]
                row.append((kernel * box).sum(dim=(1, 2, 3, 4)) + bias)
        tokens.append(row)
    return tokens


def attend(
    state: State, name: str, queries: list[Tensor], seen: Callable[[int, int], list[int]]
) -> list[Tensor]:
    """Multi-head attention; `seen` gives the numbers of the tokens that a head lets a query see."""
    projected = [dense(state, f"{name}.qkv", token).view(3, HEADS, WIDTH // HEADS) for token in queries]
    result = []
    for number, (query, _, _) in enumerate(projected):
        heads = []
        for head in range(HEADS):
            visible = seen(head, number)
            logits = [
                float(query[head] @ projected[other][1, head]) / math.sqrt(WIDTH / HEADS) for other in visible
            ]
            exponents = [math.exp(logit - max(logits)) for logit in logits]
            weights = [value / sum(exponents) for value in exponents]
            heads.append(
                sum(w * projected[other][2, head] for w, other in zip(weights, visible, strict=True))
            )
        result.append(dense(state, f"{name}.proj", torch.cat(heads)))  # type: ignore[arg-type]
    return result


def encoder(state: State, blocks: str, tokens: list[Tensor]) -> list[Tensor]:
    """Plain pre-norm blocks in which everybody sees everybody."""
    everybody = list(range(len(tokens)))
    for layer in range(DEPTH):
        name = f"{blocks}.{layer}"
        normed = [norm(state, f"{name}.norm1", token) for token in tokens]
        added = attend(state, f"{name}.attn", normed, lambda head, number: everybody)
        tokens = [token + more for token, more in zip(tokens, added, strict=True)]
        tokens = [token + mlp(state, f"{name}.mlp", norm(state, f"{name}.norm2", token)) for token in tokens]
    return tokens


def model_2(state: State, clip: Tensor) -> Tensor:
    vectors = []
    for row in tokens_of(state, clip):
        first = state["places.class_token"] + state["places.class_place"]
        placed = [token + state["places.weight"][0].flatten(0, 1)[n] for n, token in enumerate(row)]
        vectors.append(norm(state, "norm", encoder(state, "blocks", [first, *placed])[0]))
    first = state["temporal_places.class_token"] + state["temporal_places.class_place"]
    placed = [vector + state["temporal_places.weight"][time, 0, 0] for time, vector in enumerate(vectors)]
    final = encoder(state, "temporal_blocks", [first, *placed])[0]
    return dense(state, "heads.clips", norm(state, "temporal_norm", final))


def same_time(head: int, number: int) -> list[int]:
    time = number // PLACES
    return list(range(time * PLACES, (time + 1) * PLACES))


def same_place(head: int, number: int) -> list[int]:
    return list(range(number % PLACES, TIMES * PLACES, PLACES))


def placed_tokens(state: State, clip: Tensor) -> list[Tensor]:
    flat = [token for row in tokens_of(state, clip) for token in row]
    return [token + state["places.weight"].flatten(0, 2)[number] for number, token in enumerate(flat)]


def classify_mean(state: State, tokens: list[Tensor]) -> Tensor:
    normed = [norm(state, "norm", token) for token in tokens]
    return dense(state, "heads.clips", sum(normed) / len(normed))  # type: ignore[arg-type]


def model_3(state: State, clip: Tensor, time_first: bool) -> Tensor:
    tokens = placed_tokens(state, clip)
    for layer in range(DEPTH):
        name = f"blocks.{layer}"
        space = (f"{name}.norm1", f"{name}.attn", same_time)
        time = (f"{name}.temporal_norm", f"{name}.temporal_attn", same_place)
        for of_norm, attention, seen in (time, space) if time_first else (space, time):
            added = attend(state, attention, [norm(state, of_norm, token) for token in tokens], seen)
            tokens = [token + more for token, more in zip(tokens, added, strict=True)]
        tokens = [token + mlp(state, f"{name}.mlp", norm(state, f"{name}.norm2", token)) for token in tokens]
    return classify_mean(state, tokens)


def model_4(state: State, clip: Tensor) -> Tensor:
    tokens = placed_tokens(state, clip)

    def seen(head: int, number: int) -> list[int]:
        return same_place(head, number) if head < HEADS // 2 else same_time(head, number)

    for layer in range(DEPTH):
        name = f"blocks.{layer}"
        normed = [norm(state, f"{name}.norm1", token) for token in tokens]
        added = attend(state, f"{name}.attn", normed, seen)
        tokens = [token + more for token, more in zip(tokens, added, strict=True)]
        tokens = [token + mlp(state, f"{name}.mlp", norm(state, f"{name}.norm2", token)) for token in tokens]
    return classify_mean(state, tokens)


@pytest.mark.parametrize(
    ("name", "changes", "reference"),
    [
        ("vivit_ti_m2", {"temporal_depth": DEPTH}, model_2),
        ("vivit_ti_m3", {"order": "space_time"}, lambda state, clip: model_3(state, clip, False)),
        ("vivit_ti_m3", {"order": "time_space"}, lambda state, clip: model_3(state, clip, True)),
        ("vivit_ti_m4", {}, model_4),
    ],
)
@torch.no_grad()
def test_the_model_is_its_formula(
    name: str, changes: dict[str, object], reference: Callable[[State, Tensor], Tensor]
) -> None:
    model = make(name, INPUTS, **changes).double().eval()
    shake(model)
    clips = pixels(INPUTS)["clips"].double()
    state = {key: value.detach() for key, value in model.state_dict().items()}
    expected = torch.stack([reference(state, clip) for clip in clips])
    # the classifier computes in float32 whatever the model's type is
    torch.testing.assert_close(model({"clips": clips})["clips"].double(), expected, rtol=1e-5, atol=1e-5)
