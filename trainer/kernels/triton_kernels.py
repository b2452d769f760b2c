"""Group norm with SiLU, and GEGLU, forward and backward, in one or two passes where torch takes six, by Triton.

Numbers lie in order, those of pictures channels last; they are computed in fp32 and rounded once. No sum is in an order
that chance decides. Imported only where Triton is installed, as it is with torch's builds for CUDA on Linux.
"""

import torch
import triton
import triton.language as tl

ROWS, COLUMNS, CHUNKS, BLOCK = 256, 16, 64, 1024
SIZES = "pixels", "channels", "groups"  # one kernel for all, since each takes a third of a second to compile


def group_norm(
    x: torch.Tensor, shift: torch.Tensor | None, groups: int, weight: torch.Tensor, bias: torch.Tensor, eps: float,
    silu: bool,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """Of x + shift, (B, C, H, W) channels last and (B, C), with SiLU behind it or not (Wu and He 2018); and of each
    group mean and 1 / standard deviation, (B · groups, 2) in fp32."""
    grid, sizes, partial = _parts(x, groups)
    moments, y = x.new_empty(grid[0], 2, dtype=torch.float32), torch.empty_like(x)
    read = x, x if shift is None else shift
    _moments[grid](*read, partial, *sizes, ROWS, COLUMNS, shift is not None)
    _normalized[grid](
        *read, weight, bias, partial, moments, y, *sizes, eps, ROWS, COLUMNS, shift is not None, CHUNKS, silu
    )
    return y, moments


def group_norm_backward(
    gradient: torch.Tensor, x: torch.Tensor, shift: torch.Tensor | None, groups: int, weight: torch.Tensor,
    bias: torch.Tensor, moments: torch.Tensor, silu: bool,
) -> torch.Tensor:  # fmt: skip
    """Gradient of x, (B, C, H, W), where that of y is channels last, too."""
    grid, sizes, partial = _parts(x, groups)
    of_x, read = torch.empty_like(x), (x, x if shift is None else shift, gradient, weight, bias, moments, partial)
    _sums[grid](*read, *sizes, ROWS, COLUMNS, shift is not None, silu)
    _gradients[grid](*read, of_x, *sizes, ROWS, COLUMNS, shift is not None, CHUNKS, silu)
    return of_x


def geglu(joint: torch.Tensor) -> torch.Tensor:
    """hidden · gelu(gate), (rows, C), of both side by side, (rows, 2 C) (Shazeer 2020), with the exact gelu."""
    rows, width = joint.shape[0], joint.shape[1] // 2
    out = joint.new_empty(rows, width)
    _geglu[rows, triton.cdiv(width, BLOCK)](joint, out, width, BLOCK)
    return out


def geglu_backward(gradient: torch.Tensor, joint: torch.Tensor) -> torch.Tensor:
    """Gradient of both, (rows, 2 C), of that of the product, (rows, C)."""
    of_joint, width = torch.empty_like(joint), gradient.shape[1]
    _geglu_gradients[len(joint), triton.cdiv(width, BLOCK)](joint, gradient, of_joint, width, BLOCK)
    return of_joint


def _parts(x: torch.Tensor, groups: int) -> tuple[tuple[int, int], tuple[int, int, int], torch.Tensor]:
    """Programs: groups of all pictures × chunks of pixels; (pixels, channels, groups); room for two numbers of each
    program."""
    batch, channels, height, width = x.shape
    grid = batch * groups, triton.cdiv(height * width, ROWS)
    return grid, (height * width, channels, groups), x.new_empty(*grid, 2, dtype=torch.float32)


@triton.jit
def _tile(group, chunk, pixels, channels, groups, first, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Offsets (ROWS, COLUMNS) of a part of a group's chunk, from its column `first` on; which of them are there; their
    channels (1, COLUMNS); and where the picture's shift begins."""
    width = channels // groups
    rows = chunk * ROWS + tl.arange(0, ROWS)[:, None]
    columns = first + tl.arange(0, COLUMNS)[None, :]
    channel = (group % groups) * width + columns
    picture = (group // groups).to(tl.int64)
    is_there = (rows < pixels) & (columns < width)
    return picture * pixels * channels + rows * channels + channel, is_there, channel, picture * channels


@triton.jit
def _read(x, shift, at, is_there, channel, shift_at, channels, SHIFTED: tl.constexpr):
    value = tl.load(x + at, mask=is_there, other=0.0).to(tl.float32)
    if SHIFTED:
        value += tl.load(shift + shift_at + channel, mask=channel < channels, other=0.0).to(tl.float32)
    return value


@triton.jit(do_not_specialize=SIZES)
def _moments(
    x, shift, partial, pixels, channels, groups,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, SHIFTED: tl.constexpr,
):  # fmt: skip
    """Mean and sum of squares around it of each chunk, its parts joined as Chan et al. 1979 have it."""
    group, chunk = tl.program_id(0), tl.program_id(1)
    width = channels // groups
    rows = tl.minimum(pixels - chunk * ROWS, ROWS)
    mean, squares, count, first = 0.0, 0.0, 0.0, 0
    while first < width:
        at, is_there, channel, shift_at = _tile(group, chunk, pixels, channels, groups, first, ROWS, COLUMNS)
        value = _read(x, shift, at, is_there, channel, shift_at, channels, SHIFTED)
        more = (rows * tl.minimum(width - first, COLUMNS)).to(tl.float32)
        middle = tl.sum(tl.where(is_there, value, 0.0)) / more
        off = tl.where(is_there, value - middle, 0.0)
        apart = middle - mean
        squares += tl.sum(off * off) + apart * apart * count * more / (count + more)
        count += more
        mean += apart * more / count
        first += COLUMNS
    place = partial + 2 * (group * tl.num_programs(1) + chunk)
    tl.store(place, mean)
    tl.store(place + 1, squares)


@triton.jit(do_not_specialize=SIZES)
def _normalized(
    x, shift, weight, bias, partial, moments, y, pixels, channels, groups, eps,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, SHIFTED: tl.constexpr, CHUNKS: tl.constexpr, SILU: tl.constexpr,
):  # fmt: skip
    """One chunk of the result, after the moments of all chunks of its group are joined."""
    group, chunk, chunks = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    width = channels // groups
    total = (pixels * width).to(tl.float32)
    mean, first = 0.0, 0
    while first < chunks:
        number = first + tl.arange(0, CHUNKS)
        is_one = number < chunks
        share = (tl.minimum(pixels - number * ROWS, ROWS) * width).to(tl.float32) / total
        means = tl.load(partial + 2 * (group * chunks + number), mask=is_one, other=0.0)
        mean += tl.sum(tl.where(is_one, means * share, 0.0))
        first += CHUNKS
    squares, first = 0.0, 0
    while first < chunks:
        number = first + tl.arange(0, CHUNKS)
        is_one = number < chunks
        place = partial + 2 * (group * chunks + number)
        count = (tl.minimum(pixels - number * ROWS, ROWS) * width).to(tl.float32)
        apart = tl.load(place, mask=is_one, other=0.0) - mean
        inside = tl.load(place + 1, mask=is_one, other=0.0)
        squares += tl.sum(tl.where(is_one, inside + count * apart * apart, 0.0))
        first += CHUNKS
    scale = tl.rsqrt(squares / total + eps)
    if chunk == 0:
        tl.store(moments + 2 * group, mean)
        tl.store(moments + 2 * group + 1, scale)
    first = 0
    while first < width:
        at, is_there, channel, shift_at = _tile(group, chunk, pixels, channels, groups, first, ROWS, COLUMNS)
        w = tl.load(weight + channel, mask=channel < channels, other=0.0).to(tl.float32)
        b = tl.load(bias + channel, mask=channel < channels, other=0.0).to(tl.float32)
        value = (_read(x, shift, at, is_there, channel, shift_at, channels, SHIFTED) - mean) * scale * w + b
        if SILU:
            value = value * tl.sigmoid(value)
        tl.store(y + at, value, mask=is_there)
        first += COLUMNS


@triton.jit
def _inner(
    x, shift, gradient, weight, bias, mean, scale, group, chunk, pixels, channels, groups, first,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, SHIFTED: tl.constexpr, SILU: tl.constexpr,
):  # fmt: skip
    """Of a part of a chunk: the normalised input, the gradient of that, offsets, and what of it is there."""
    at, is_there, channel, shift_at = _tile(group, chunk, pixels, channels, groups, first, ROWS, COLUMNS)
    w = tl.load(weight + channel, mask=channel < channels, other=0.0).to(tl.float32)
    b = tl.load(bias + channel, mask=channel < channels, other=0.0).to(tl.float32)
    normal = (_read(x, shift, at, is_there, channel, shift_at, channels, SHIFTED) - mean) * scale
    g = tl.load(gradient + at, mask=is_there, other=0.0).to(tl.float32)
    if SILU:
        z = normal * w + b
        s = tl.sigmoid(z)
        g = g * s * (1 + z * (1 - s))
    return normal, g * w, at, is_there


@triton.jit(do_not_specialize=SIZES)
def _sums(
    x, shift, gradient, weight, bias, moments, partial, pixels, channels, groups,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, SHIFTED: tl.constexpr, SILU: tl.constexpr,
):  # fmt: skip
    """Sums over each chunk: of the normalised input's gradient, and of that times the input."""
    group, chunk = tl.program_id(0), tl.program_id(1)
    mean, scale = tl.load(moments + 2 * group), tl.load(moments + 2 * group + 1)
    plain, crossed, first = 0.0, 0.0, 0
    while first < channels // groups:
        normal, g, _, is_there = _inner(
            x, shift, gradient, weight, bias, mean, scale, group, chunk, pixels, channels, groups, first,
            ROWS, COLUMNS, SHIFTED, SILU,
        )  # fmt: skip
        plain += tl.sum(tl.where(is_there, g, 0.0))
        crossed += tl.sum(tl.where(is_there, g * normal, 0.0))
        first += COLUMNS
    place = partial + 2 * (group * tl.num_programs(1) + chunk)
    tl.store(place, plain)
    tl.store(place + 1, crossed)


@triton.jit(do_not_specialize=SIZES)
def _gradients(
    x, shift, gradient, weight, bias, moments, partial, of_x, pixels, channels, groups,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, SHIFTED: tl.constexpr, CHUNKS: tl.constexpr, SILU: tl.constexpr,
):  # fmt: skip
    """One chunk of the input's gradient: (g - mean(g) - normal · mean(g · normal)) / standard deviation."""
    group, chunk, chunks = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    mean, scale = tl.load(moments + 2 * group), tl.load(moments + 2 * group + 1)
    plain, crossed, first = 0.0, 0.0, 0
    while first < chunks:
        number = first + tl.arange(0, CHUNKS)
        place = partial + 2 * (group * chunks + number)
        plain += tl.sum(tl.load(place, mask=number < chunks, other=0.0))
        crossed += tl.sum(tl.load(place + 1, mask=number < chunks, other=0.0))
        first += CHUNKS
    total = (pixels * (channels // groups)).to(tl.float32)
    plain, crossed, first = plain / total, crossed / total, 0
    while first < channels // groups:
        normal, g, at, is_there = _inner(
            x, shift, gradient, weight, bias, mean, scale, group, chunk, pixels, channels, groups, first,
            ROWS, COLUMNS, SHIFTED, SILU,
        )  # fmt: skip
        tl.store(of_x + at, (g - plain - normal * crossed) * scale, mask=is_there)
        first += COLUMNS


@triton.jit
def _gelu(gate):
    """Φ(gate), by which gelu multiplies, and the gradient of gelu."""
    share = 0.5 * (1 + tl.math.erf(gate * 0.7071067811865476))
    return share, share + gate * 0.3989422804014327 * tl.exp(-0.5 * gate * gate)


@triton.jit
def _geglu(joint, out, width, BLOCK: tl.constexpr):
    row, columns = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    is_there, place = columns < width, joint + 2 * row * width + columns
    hidden = tl.load(place, mask=is_there, other=0.0).to(tl.float32)
    gate = tl.load(place + width, mask=is_there, other=0.0).to(tl.float32)
    share, _ = _gelu(gate)
    tl.store(out + row * width + columns, hidden * gate * share, mask=is_there)


@triton.jit
def _geglu_gradients(joint, gradient, of_joint, width, BLOCK: tl.constexpr):
    row, columns = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    is_there, start = columns < width, 2 * row * width + columns
    hidden = tl.load(joint + start, mask=is_there, other=0.0).to(tl.float32)
    gate = tl.load(joint + start + width, mask=is_there, other=0.0).to(tl.float32)
    g = tl.load(gradient + row * width + columns, mask=is_there, other=0.0).to(tl.float32)
    share, slope = _gelu(gate)
    tl.store(of_joint + start, g * gate * share, mask=is_there)
    tl.store(of_joint + start + width, g * hidden * slope, mask=is_there)
