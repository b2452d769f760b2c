"""Triton kernels for group norm with SiLU and for GEGLU, forward and backward: two passes at most, not six.

Tensors are contiguous, those of images in channels_last. Everything is computed in fp32 and rounded once. All sums are
deterministic. Imported only if Triton is installed; torch's CUDA builds for Linux include it.
"""

import torch
import triton
import triton.language as tl

ROWS, COLUMNS, CHUNKS, BLOCK = 256, 16, 64, 1024
SIZES = "pixels", "channels", "groups"  # not specialized, since each variant takes 0.3 s to compile


def group_norm(
    x: torch.Tensor, shift: torch.Tensor | None, groups: int, weight: torch.Tensor, bias: torch.Tensor, eps: float,
    silu: bool,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """The group norm (Wu and He 2018) of x + shift, optionally followed by SiLU, and the moments of each group.

    x is (B, C, H, W) in channels_last, shift (B, C). The moments are mean and 1 / standard deviation, (B · groups, 2)
    in fp32.
    """
    grid, sizes, partial = _grid(x, groups)
    moments, y = x.new_empty(grid[0], 2, dtype=torch.float32), torch.empty_like(x)
    inputs = x, x if shift is None else shift
    _moments[grid](*inputs, partial, *sizes, ROWS, COLUMNS, shift is not None)
    _normalized[grid](
        *inputs, weight, bias, partial, moments, y, *sizes, eps, ROWS, COLUMNS, shift is not None, CHUNKS, silu
    )
    return y, moments


def group_norm_backward(
    gradient: torch.Tensor, x: torch.Tensor, shift: torch.Tensor | None, groups: int, weight: torch.Tensor,
    bias: torch.Tensor, moments: torch.Tensor, silu: bool,
) -> torch.Tensor:  # fmt: skip
    """The gradient of x, (B, C, H, W), from the gradient of y, which is in channels_last too."""
    grid, sizes, partial = _grid(x, groups)
    x_grad, inputs = torch.empty_like(x), (x, x if shift is None else shift, gradient, weight, bias, moments, partial)
    _sums[grid](*inputs, *sizes, ROWS, COLUMNS, shift is not None, silu)
    _gradients[grid](*inputs, x_grad, *sizes, ROWS, COLUMNS, shift is not None, CHUNKS, silu)
    return x_grad


def geglu(joint: torch.Tensor) -> torch.Tensor:
    """hidden · gelu(gate), (rows, C), from their concatenation (rows, 2 C) (Shazeer 2020), with the exact GELU."""
    rows, width = joint.shape[0], joint.shape[1] // 2
    out = joint.new_empty(rows, width)
    _geglu[rows, triton.cdiv(width, BLOCK)](joint, out, width, BLOCK)
    return out


def geglu_backward(gradient: torch.Tensor, joint: torch.Tensor) -> torch.Tensor:
    """The gradient of the concatenation, (rows, 2 C), from the gradient of the product, (rows, C)."""
    joint_grad, width = torch.empty_like(joint), gradient.shape[1]
    _geglu_gradients[len(joint), triton.cdiv(width, BLOCK)](joint, gradient, joint_grad, width, BLOCK)
    return joint_grad


def _grid(x: torch.Tensor, groups: int) -> tuple[tuple[int, int], tuple[int, int, int], torch.Tensor]:
    """The grid (groups of all images, chunks of pixels), the `SIZES`, and a buffer for two numbers per program."""
    batch, channels, height, width = x.shape
    grid = batch * groups, triton.cdiv(height * width, ROWS)
    return grid, (height * width, channels, groups), x.new_empty(*grid, 2, dtype=torch.float32)


@triton.jit
def _tile(group, chunk, pixels, channels, groups, first, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """A tile of a group's chunk that starts at column `first`.

    Returns offsets (ROWS, COLUMNS), their mask, their channels (1, COLUMNS), and the offset of the image's shift.
    """
    width = channels // groups
    rows = chunk * ROWS + tl.arange(0, ROWS)[:, None]
    columns = first + tl.arange(0, COLUMNS)[None, :]
    channel = (group % groups) * width + columns
    image = (group // groups).to(tl.int64)
    mask = (rows < pixels) & (columns < width)
    return image * pixels * channels + rows * channels + channel, mask, channel, image * channels


@triton.jit
def _read(x, shift, offsets, mask, channel, shift_offset, channels, SHIFTED: tl.constexpr):
    value = tl.load(x + offsets, mask=mask, other=0.0).to(tl.float32)
    if SHIFTED:
        value += tl.load(shift + shift_offset + channel, mask=channel < channels, other=0.0).to(tl.float32)
    return value


@triton.jit(do_not_specialize=SIZES)
def _moments(
    x, shift, partial, pixels, channels, groups,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, SHIFTED: tl.constexpr,
):  # fmt: skip
    """The mean and the sum of squared deviations of each chunk; tiles are combined as in Chan et al. 1979."""
    group, chunk = tl.program_id(0), tl.program_id(1)
    width = channels // groups
    rows = tl.minimum(pixels - chunk * ROWS, ROWS)
    mean, squares, count, first = 0.0, 0.0, 0.0, 0
    while first < width:
        offsets, mask, channel, shift_offset = _tile(group, chunk, pixels, channels, groups, first, ROWS, COLUMNS)
        value = _read(x, shift, offsets, mask, channel, shift_offset, channels, SHIFTED)
        tile_count = (rows * tl.minimum(width - first, COLUMNS)).to(tl.float32)
        tile_mean = tl.sum(tl.where(mask, value, 0.0)) / tile_count
        centered = tl.where(mask, value - tile_mean, 0.0)
        delta = tile_mean - mean
        squares += tl.sum(centered * centered) + delta * delta * count * tile_count / (count + tile_count)
        count += tile_count
        mean += delta * tile_count / count
        first += COLUMNS
    pointer = partial + 2 * (group * tl.num_programs(1) + chunk)
    tl.store(pointer, mean)
    tl.store(pointer + 1, squares)


@triton.jit(do_not_specialize=SIZES)
def _normalized(
    x, shift, weight, bias, partial, moments, y, pixels, channels, groups, eps,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, SHIFTED: tl.constexpr, CHUNKS: tl.constexpr, SILU: tl.constexpr,
):  # fmt: skip
    """One chunk of the result; first combines the moments of all chunks of the group."""
    group, chunk, chunks = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    width = channels // groups
    total = (pixels * width).to(tl.float32)
    mean, first = 0.0, 0
    while first < chunks:
        index = first + tl.arange(0, CHUNKS)
        mask = index < chunks
        fraction = (tl.minimum(pixels - index * ROWS, ROWS) * width).to(tl.float32) / total
        means = tl.load(partial + 2 * (group * chunks + index), mask=mask, other=0.0)
        mean += tl.sum(tl.where(mask, means * fraction, 0.0))
        first += CHUNKS
    squares, first = 0.0, 0
    while first < chunks:
        index = first + tl.arange(0, CHUNKS)
        mask = index < chunks
        pointer = partial + 2 * (group * chunks + index)
        count = (tl.minimum(pixels - index * ROWS, ROWS) * width).to(tl.float32)
        delta = tl.load(pointer, mask=mask, other=0.0) - mean
        within = tl.load(pointer + 1, mask=mask, other=0.0)
        squares += tl.sum(tl.where(mask, within + count * delta * delta, 0.0))
        first += CHUNKS
    scale = tl.rsqrt(squares / total + eps)
    if chunk == 0:
        tl.store(moments + 2 * group, mean)
        tl.store(moments + 2 * group + 1, scale)
    first = 0
    while first < width:
        offsets, mask, channel, shift_offset = _tile(group, chunk, pixels, channels, groups, first, ROWS, COLUMNS)
        w = tl.load(weight + channel, mask=channel < channels, other=0.0).to(tl.float32)
        b = tl.load(bias + channel, mask=channel < channels, other=0.0).to(tl.float32)
        value = (_read(x, shift, offsets, mask, channel, shift_offset, channels, SHIFTED) - mean) * scale * w + b
        if SILU:
            value = value * tl.sigmoid(value)
        tl.store(y + offsets, value, mask=mask)
        first += COLUMNS


@triton.jit
def _inner(
    x, shift, gradient, weight, bias, mean, scale, group, chunk, pixels, channels, groups, first,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, SHIFTED: tl.constexpr, SILU: tl.constexpr,
):  # fmt: skip
    """The normalized input of a tile, its gradient, the offsets and their mask."""
    offsets, mask, channel, shift_offset = _tile(group, chunk, pixels, channels, groups, first, ROWS, COLUMNS)
    w = tl.load(weight + channel, mask=channel < channels, other=0.0).to(tl.float32)
    b = tl.load(bias + channel, mask=channel < channels, other=0.0).to(tl.float32)
    normal = (_read(x, shift, offsets, mask, channel, shift_offset, channels, SHIFTED) - mean) * scale
    g = tl.load(gradient + offsets, mask=mask, other=0.0).to(tl.float32)
    if SILU:
        z = normal * w + b
        s = tl.sigmoid(z)
        g = g * s * (1 + z * (1 - s))
    return normal, g * w, offsets, mask


@triton.jit(do_not_specialize=SIZES)
def _sums(
    x, shift, gradient, weight, bias, moments, partial, pixels, channels, groups,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, SHIFTED: tl.constexpr, SILU: tl.constexpr,
):  # fmt: skip
    """Sums over each chunk of the normalized input's gradient g, and of g · normalized input."""
    group, chunk = tl.program_id(0), tl.program_id(1)
    mean, scale = tl.load(moments + 2 * group), tl.load(moments + 2 * group + 1)
    sum_g, sum_gn, first = 0.0, 0.0, 0
    while first < channels // groups:
        normal, g, _, mask = _inner(
            x, shift, gradient, weight, bias, mean, scale, group, chunk, pixels, channels, groups, first,
            ROWS, COLUMNS, SHIFTED, SILU,
        )  # fmt: skip
        sum_g += tl.sum(tl.where(mask, g, 0.0))
        sum_gn += tl.sum(tl.where(mask, g * normal, 0.0))
        first += COLUMNS
    pointer = partial + 2 * (group * tl.num_programs(1) + chunk)
    tl.store(pointer, sum_g)
    tl.store(pointer + 1, sum_gn)


@triton.jit(do_not_specialize=SIZES)
def _gradients(
    x, shift, gradient, weight, bias, moments, partial, x_grad, pixels, channels, groups,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, SHIFTED: tl.constexpr, CHUNKS: tl.constexpr, SILU: tl.constexpr,
):  # fmt: skip
    """One chunk of the input's gradient: (g - mean(g) - normal · mean(g · normal)) / standard deviation."""
    group, chunk, chunks = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    mean, scale = tl.load(moments + 2 * group), tl.load(moments + 2 * group + 1)
    sum_g, sum_gn, first = 0.0, 0.0, 0
    while first < chunks:
        index = first + tl.arange(0, CHUNKS)
        pointer = partial + 2 * (group * chunks + index)
        sum_g += tl.sum(tl.load(pointer, mask=index < chunks, other=0.0))
        sum_gn += tl.sum(tl.load(pointer + 1, mask=index < chunks, other=0.0))
        first += CHUNKS
    total = (pixels * (channels // groups)).to(tl.float32)
    mean_g, mean_gn, first = sum_g / total, sum_gn / total, 0
    while first < channels // groups:
        normal, g, offsets, mask = _inner(
            x, shift, gradient, weight, bias, mean, scale, group, chunk, pixels, channels, groups, first,
            ROWS, COLUMNS, SHIFTED, SILU,
        )  # fmt: skip
        tl.store(x_grad + offsets, (g - mean_g - normal * mean_gn) * scale, mask=mask)
        first += COLUMNS


@triton.jit
def _gelu(gate):
    """Φ(gate), the factor of GELU, and the derivative of GELU."""
    cdf = 0.5 * (1 + tl.math.erf(gate * 0.7071067811865476))
    return cdf, cdf + gate * 0.3989422804014327 * tl.exp(-0.5 * gate * gate)


@triton.jit
def _geglu(joint, out, width, BLOCK: tl.constexpr):
    row, columns = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask, pointer = columns < width, joint + 2 * row * width + columns
    hidden = tl.load(pointer, mask=mask, other=0.0).to(tl.float32)
    gate = tl.load(pointer + width, mask=mask, other=0.0).to(tl.float32)
    cdf, _ = _gelu(gate)
    tl.store(out + row * width + columns, hidden * gate * cdf, mask=mask)


@triton.jit
def _geglu_gradients(joint, gradient, joint_grad, width, BLOCK: tl.constexpr):
    row, columns = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask, start = columns < width, 2 * row * width + columns
    hidden = tl.load(joint + start, mask=mask, other=0.0).to(tl.float32)
    gate = tl.load(joint + start + width, mask=mask, other=0.0).to(tl.float32)
    g = tl.load(gradient + row * width + columns, mask=mask, other=0.0).to(tl.float32)
    cdf, slope = _gelu(gate)
    tl.store(joint_grad + start, g * gate * cdf, mask=mask)
    tl.store(joint_grad + start + width, g * hidden * slope, mask=mask)
