# Copyright 2026 The PIIP for Transformers authors. MIT license.
"""
Deformable attention for GPUs in Triton, forward and backward: the same as `attend_around_references` in plain PyTorch,
with locations and softmax computed where they are used.

A row is one head of one query, and a program handles a block of rows: their offsets, logits and outputs lie side by
side in memory, and a row reads all channels of a cell at once. Values, offsets and logits may be float32, bfloat16 or
float16; coordinates, weights and sums are float32. Indices that grow with the batch are 64 bits wide.
"""

import functools
import re
import subprocess

import torch


try:
    import triton
    import triton.language as tl
except ImportError as error:
    raise ImportError("Triton is not installed") from error


# Code from the Hub is loaded once per checkpoint, each time as another module, and every copy has its own operators.
# The name of the module holds that of the folder, which may be anything.
NAMESPACE = re.sub(r"[^a-zA-Z0-9]", "_", __name__)
# Triton starts four warps unless told otherwise. A thread moves at most 16 bytes at once.
NUM_THREADS = 128
THREAD_BYTES = 16
# Triton would compile again for sizes that are one or multiples of 16.
SIZES = ["num_rows", "num_queries", "num_values", "batch_stride", "query_stride", "level_stride"]


# ------------------------------------------------ inside a program ------------------------------------------------


@triton.jit
def get_rows(num_rows, BLOCK_ROWS: tl.constexpr):
    """Rows of this program. Those past the end repeat the last one, and are masked where something is written."""
    rows = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    return tl.minimum(rows, num_rows - 1), rows < num_rows


@triton.jit
def get_log_sum_exp(logits, rows, NUM_SAMPLES: tl.constexpr, BLOCK_SAMPLES: tl.constexpr):
    """What makes a weight of a logit: `weight = exp(logit - log_sum_exp)`."""
    samples = tl.arange(0, BLOCK_SAMPLES)[None, :]
    tile = tl.load(logits + rows[:, None] * NUM_SAMPLES + samples, mask=samples < NUM_SAMPLES, other=-float("inf"))
    tile = tile.to(tl.float32)
    maximum = tl.max(tile, axis=1)
    return maximum + tl.log(tl.sum(tl.exp(tile - maximum[:, None]), axis=1))


@triton.jit
def load_reference(reference, height, width, HAS_BOXES: tl.constexpr, NUM_POINTS: tl.constexpr):
    """Where the offset is zero, and how far an offset of one leads from there: (x, y) of both, in cells."""
    x = tl.load(reference).to(tl.float32) * width
    y = tl.load(reference + 1).to(tl.float32) * height
    if HAS_BOXES:
        scale_x = tl.load(reference + 2).to(tl.float32) * (width / (2 * NUM_POINTS))
        scale_y = tl.load(reference + 3).to(tl.float32) * (height / (2 * NUM_POINTS))
    else:
        scale_x = tl.full(x.shape, 1.0, tl.float32)
        scale_y = tl.full(y.shape, 1.0, tl.float32)
    return x, y, scale_x, scale_y


@triton.jit
def load_sample(offsets, logits, sample, log_sum_exp):
    """Offset along x and along y, and weight."""
    offset_x = tl.load(offsets + 2 * sample).to(tl.float32)
    offset_y = tl.load(offsets + 2 * sample + 1).to(tl.float32)
    return offset_x, offset_y, tl.exp(tl.load(logits + sample).to(tl.float32) - log_sum_exp)


@triton.jit
def get_cell(place, size):
    """The last cell whose centre is not behind `place`, along one axis, and how far behind its centre `place` is."""
    # Beyond these bounds nothing changes, because all neighbours are outside. Within them a cell is a small integer.
    place = tl.minimum(tl.maximum(place - 0.5, -2.0), size + 1.0)
    cell = tl.floor(place)
    return cell.to(tl.int32), place - cell


@triton.jit
def get_neighbour(column, row, part_x, part_y, height, width, K: tl.constexpr):
    """The k-th of the four cells around a place: its index, whether it exists, and its share along x and along y."""
    x = column + K % 2
    y = row + K // 2
    exists = (x >= 0) & (x < width) & (y >= 0) & (y < height)
    share_x = part_x if K % 2 else 1 - part_x
    share_y = part_y if K // 2 else 1 - part_y
    return y * width + x, exists, share_x, share_y


@triton.jit(do_not_specialize=SIZES)
def forward_kernel(
    value,
    offsets,
    logits,
    references,
    output,
    heights,
    widths,
    num_rows,
    num_queries,
    num_values,
    batch_stride,
    query_stride,
    level_stride,
    NUM_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    NUM_LEVELS: tl.constexpr,
    NUM_POINTS: tl.constexpr,
    HAS_BOXES: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    BLOCK_SAMPLES: tl.constexpr,
):
    NUM_SAMPLES: tl.constexpr = NUM_LEVELS * NUM_POINTS
    rows, is_row = get_rows(num_rows, BLOCK_ROWS)
    queries = rows // NUM_HEADS
    batch = queries // num_queries
    channels = tl.arange(0, BLOCK_DIM)[None, :]
    is_channel = channels < HEAD_DIM

    reference = references + batch * batch_stride + queries % num_queries * query_stride
    # the first cell of the level, at this head
    start = (batch * num_values * NUM_HEADS + rows % NUM_HEADS) * HEAD_DIM
    log_sum_exp = get_log_sum_exp(logits, rows, NUM_SAMPLES, BLOCK_SAMPLES)
    result = tl.zeros((BLOCK_ROWS, BLOCK_DIM), dtype=tl.float32)
    for level in tl.static_range(NUM_LEVELS):
        height = tl.cast(heights[level], tl.int32)
        width = tl.cast(widths[level], tl.int32)
        x, y, scale_x, scale_y = load_reference(reference, heights[level], widths[level], HAS_BOXES, NUM_POINTS)
        for point in range(NUM_POINTS):
            sample = rows * NUM_SAMPLES + (level * NUM_POINTS + point)
            offset_x, offset_y, weight = load_sample(offsets, logits, sample, log_sum_exp)
            column, part_x = get_cell(x + offset_x * scale_x, widths[level])
            row, part_y = get_cell(y + offset_y * scale_y, heights[level])
            for k in tl.static_range(4):
                cell, exists, share_x, share_y = get_neighbour(column, row, part_x, part_y, height, width, k)
                index = (start + cell.to(tl.int64) * (NUM_HEADS * HEAD_DIM))[:, None] + channels
                cells = tl.load(value + index, mask=exists[:, None] & is_channel, other=0.0).to(tl.float32)
                result += cells * (weight * share_x * share_y)[:, None]
        start += (height * width).to(tl.int64) * (NUM_HEADS * HEAD_DIM)
        reference += level_stride
    tl.store(output + rows[:, None] * HEAD_DIM + channels, result, mask=is_row[:, None] & is_channel)


@triton.jit(do_not_specialize=SIZES)
def backward_kernel(
    value,
    offsets,
    logits,
    references,
    output,
    grad_output,
    grad_value,
    grad_offsets,
    grad_logits,
    grad_references,
    heights,
    widths,
    num_rows,
    num_queries,
    num_values,
    batch_stride,
    query_stride,
    level_stride,
    NEEDS_REFERENCES: tl.constexpr,
    NUM_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    NUM_LEVELS: tl.constexpr,
    NUM_POINTS: tl.constexpr,
    HAS_BOXES: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    BLOCK_SAMPLES: tl.constexpr,
):
    NUM_SAMPLES: tl.constexpr = NUM_LEVELS * NUM_POINTS
    rows, is_row = get_rows(num_rows, BLOCK_ROWS)
    queries = rows // NUM_HEADS
    batch = queries // num_queries
    channels = tl.arange(0, BLOCK_DIM)[None, :]
    is_channel = channels < HEAD_DIM

    reference = batch * batch_stride + queries % num_queries * query_stride
    start = (batch * num_values * NUM_HEADS + rows % NUM_HEADS) * HEAD_DIM
    log_sum_exp = get_log_sum_exp(logits, rows, NUM_SAMPLES, BLOCK_SAMPLES)
    index = rows[:, None] * HEAD_DIM + channels
    grad = tl.load(grad_output + index, mask=is_channel, other=0.0).to(tl.float32)
    # the output is the weighted mean of the samples, so this is the weighted mean of their `grad_weight` below
    mean = tl.sum(grad * tl.load(output + index, mask=is_channel, other=0.0).to(tl.float32), axis=1)
    for level in tl.static_range(NUM_LEVELS):
        height = tl.cast(heights[level], tl.int32)
        width = tl.cast(widths[level], tl.int32)
        x, y, scale_x, scale_y = load_reference(
            references + reference, heights[level], widths[level], HAS_BOXES, NUM_POINTS
        )
        # gradients of the places of all points, in cells, and the same times their offsets
        sum_x = tl.zeros((BLOCK_ROWS,), dtype=tl.float32)
        sum_y = tl.zeros((BLOCK_ROWS,), dtype=tl.float32)
        sum_scale_x = tl.zeros((BLOCK_ROWS,), dtype=tl.float32)
        sum_scale_y = tl.zeros((BLOCK_ROWS,), dtype=tl.float32)
        for point in range(NUM_POINTS):
            sample = rows * NUM_SAMPLES + (level * NUM_POINTS + point)
            offset_x, offset_y, weight = load_sample(offsets, logits, sample, log_sum_exp)
            column, part_x = get_cell(x + offset_x * scale_x, widths[level])
            row, part_y = get_cell(y + offset_y * scale_y, heights[level])
            grad_weight = tl.zeros((BLOCK_ROWS,), dtype=tl.float32)
            grad_x = tl.zeros((BLOCK_ROWS,), dtype=tl.float32)
            grad_y = tl.zeros((BLOCK_ROWS,), dtype=tl.float32)
            for k in tl.static_range(4):
                cell, exists, share_x, share_y = get_neighbour(column, row, part_x, part_y, height, width, k)
                index = (start + cell.to(tl.int64) * (NUM_HEADS * HEAD_DIM))[:, None] + channels
                mask = exists[:, None] & is_channel
                cells = tl.load(value + index, mask=mask, other=0.0).to(tl.float32)
                product = tl.sum(grad * cells, axis=1)
                grad_weight += product * share_x * share_y
                # moving by one cell moves the whole share
                grad_x += product * (share_y if k % 2 else -share_y)
                grad_y += product * (share_x if k // 2 else -share_x)
                grad_cells = grad * (weight * share_x * share_y)[:, None]
                tl.atomic_add(grad_value + index, grad_cells, mask=mask & is_row[:, None], sem="relaxed")
            grad_x *= weight
            grad_y *= weight
            tl.store(grad_logits + sample, weight * (grad_weight - mean), mask=is_row)
            tl.store(grad_offsets + 2 * sample, grad_x * scale_x, mask=is_row)
            tl.store(grad_offsets + 2 * sample + 1, grad_y * scale_y, mask=is_row)
            sum_x += grad_x
            sum_y += grad_y
            sum_scale_x += grad_x * offset_x
            sum_scale_y += grad_y * offset_y
        if NEEDS_REFERENCES:
            # all heads add to the same reference, and so do images and levels that share it
            pointer = grad_references + reference
            tl.atomic_add(pointer, sum_x * widths[level], mask=is_row, sem="relaxed")
            tl.atomic_add(pointer + 1, sum_y * heights[level], mask=is_row, sem="relaxed")
            if HAS_BOXES:
                scale = 1 / (2 * NUM_POINTS)
                tl.atomic_add(pointer + 2, sum_scale_x * (widths[level] * scale), mask=is_row, sem="relaxed")
                tl.atomic_add(pointer + 3, sum_scale_y * (heights[level] * scale), mask=is_row, sem="relaxed")
        start += (height * width).to(tl.int64) * (NUM_HEADS * HEAD_DIM)
        reference += level_stride


# ---------------------------------------------------- operators ----------------------------------------------------


def launch(
    kernel: triton.runtime.JITFunction,
    value: torch.Tensor,
    offsets: torch.Tensor,
    logits: torch.Tensor,
    references: torch.Tensor,
    sizes: list[int],
    *tensors: torch.Tensor,
    channel_bytes: int,
    **constants,
):
    """Starts a kernel on the inputs, `tensors` and the numbers below. `channel_bytes`: what it moves per channel."""
    batch_size, num_values, num_heads, head_dim = value.shape
    _, num_queries, _, num_levels, num_points, _ = offsets.shape
    heights, widths = sizes[0::2], sizes[1::2]
    num_cells = sum(height * width for height, width in zip(heights, widths))
    sample_shape = (batch_size, num_queries, num_heads, len(heights), num_points)
    if offsets.shape != (*sample_shape, 2) or logits.shape != sample_shape or num_cells != num_values:
        # a kernel would read past their ends
        raise ValueError(
            f"`value` {tuple(value.shape)}, `offsets` {tuple(offsets.shape)}, `logits` {tuple(logits.shape)} and "
            f"`sizes` {sizes} do not fit each other."
        )
    num_rows = batch_size * num_queries * num_heads
    block_dim = triton.next_power_of_2(head_dim)
    # As many rows as give every thread a part of one, in one piece as large as the alignment of rows allows. With more
    # rows, threads run out of registers, and pass on what they compute per row through memory.
    thread_channels = min(THREAD_BYTES // channel_bytes, head_dim & -head_dim)
    block_rows = max(1, NUM_THREADS * thread_channels // block_dim)
    # images or levels that share their references have a stride of zero
    strides = references.expand(batch_size, num_queries, num_levels, -1).stride()
    # Triton starts kernels on the current GPU
    with torch.cuda.device_of(value):
        kernel[(triton.cdiv(num_rows, block_rows),)](
            value,
            offsets,
            logits,
            references,
            *tensors,
            # kernels compute with them as floats, and Triton does not compile again for other floats
            heights=tuple(map(float, heights)),
            widths=tuple(map(float, widths)),
            num_rows=num_rows,
            num_queries=num_queries,
            num_values=num_values,
            batch_stride=strides[0],
            query_stride=strides[1],
            level_stride=strides[2],
            NUM_HEADS=num_heads,
            HEAD_DIM=head_dim,
            NUM_LEVELS=num_levels,
            NUM_POINTS=num_points,
            HAS_BOXES=references.shape[-1] == 4,
            BLOCK_ROWS=block_rows,
            BLOCK_DIM=block_dim,
            BLOCK_SAMPLES=triton.next_power_of_2(num_levels * num_points),
            **constants,
        )


@torch.library.custom_op(f"{NAMESPACE}::attend", mutates_args=())
def attend(
    value: torch.Tensor,
    offsets: torch.Tensor,
    logits: torch.Tensor,
    references: torch.Tensor,
    sizes: list[int],
) -> torch.Tensor:
    """`sizes` are height and width of every level, one after the other; the rest as in `attend_around_references`."""
    value, offsets, logits, references = (x.contiguous() for x in (value, offsets, logits, references))
    output = value.new_empty(value.shape[0], offsets.shape[1], value.shape[2] * value.shape[3])
    launch(forward_kernel, value, offsets, logits, references, sizes, output, channel_bytes=value.element_size())
    return output


@attend.register_fake
def _(value, offsets, logits, references, sizes):
    return value.new_empty(value.shape[0], offsets.shape[1], value.shape[2] * value.shape[3])


@torch.library.custom_op(f"{NAMESPACE}::attend_backward", mutates_args=())
def attend_backward(
    value: torch.Tensor,
    offsets: torch.Tensor,
    logits: torch.Tensor,
    references: torch.Tensor,
    sizes: list[int],
    output: torch.Tensor,
    grad_output: torch.Tensor,
    needs_references: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of the four inputs; that of the references is zero unless it is needed."""
    value, offsets, logits, references = (x.contiguous() for x in (value, offsets, logits, references))
    grad_value, grad_references = (torch.zeros_like(x, dtype=torch.float32) for x in (value, references))
    grad_offsets, grad_logits = torch.empty_like(offsets), torch.empty_like(logits)
    tensors = (output, grad_output.contiguous(), grad_value, grad_offsets, grad_logits, grad_references)
    launch(
        backward_kernel,
        value,
        offsets,
        logits,
        references,
        sizes,
        *tensors,
        channel_bytes=grad_value.element_size(),
        NEEDS_REFERENCES=needs_references,
    )
    return grad_value.to(value.dtype), grad_offsets, grad_logits, grad_references.to(references.dtype)


@attend_backward.register_fake
def _(value, offsets, logits, references, sizes, output, grad_output, needs_references):
    inputs = (value, offsets, logits, references)
    return tuple(torch.empty_like(x, memory_format=torch.contiguous_format) for x in inputs)


def save_for_backward(ctx, inputs, output):
    *tensors, ctx.sizes = inputs
    ctx.save_for_backward(*tensors, output)


def backward(ctx, grad_output):
    *tensors, output = ctx.saved_tensors
    needs_references = ctx.needs_input_grad[3]
    *grads, grad_references = attend_backward(*tensors, ctx.sizes, output, grad_output, needs_references)
    return *grads, grad_references if needs_references else None, None


attend.register_autograd(backward, setup_context=save_for_backward)


@functools.cache
def find_obstacle() -> str | None:
    """Why Triton cannot compile and start kernels for the current GPU; None if it can."""
    try:
        target = triton.runtime.driver.active.get_current_target()
    # no driver, no C compiler, or one that fails
    except (RuntimeError, OSError, subprocess.CalledProcessError) as error:
        return f"Triton cannot start: {error}"
    if target.backend == "cuda" and target.arch < 70:
        return f"Triton needs compute capability 7.0, and this GPU has {target.arch / 10}"
    return None
