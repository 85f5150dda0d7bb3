"""The plans that compute MoBA attention, and their export into packages.

This is the ledger of PyTorch's limits: what fails in PyTorch 2.11 to 2.13, or in the versions
named, why, and what we do about it. An entry names the test of its limit, if there is one, in
`tests/test_graphs.py` unless it says otherwise. A test with `limit` in its name fails once PyTorch
lifts the limit; then the workaround can go.

FlexAttention on CPU:

- It returns no log-sum-exp (`test_limit_flex_attention_on_cpu_has_no_lse`) and has no backward
  (`test_limit_flex_attention_on_cpu_has_no_backward`). The plan "routed" runs flash attention
  instead, part by part (`cpu.py`).
- It does not compile if a BlockMask lists fewer tiles per row than there are key tiles
  (`test_limit_lists_of_a_block_mask_have_full_width_on_cpu`). The plan "masked" lists as many.
- It reads the copy that `x.contiguous()` makes in a graph with contiguous strides, although
  inductor may have laid it out otherwise
  (`test_limit_flex_attention_on_cpu_reads_a_copy_as_contiguous`), and it ignores the storage
  offset of a view (`test_limit_flex_attention_on_cpu_forgets_where_a_view_begins`). Results are
  wrong. A custom op copies its inputs (`masks/_torch/inputs.py`).
- It returns zeros for queries of NaN (`test_limit_flex_attention_on_cpu_hides_nan`), and
  multiplies masked values by zero, so that NaN reaches queries that do not see it. It gets finite
  inputs, and an op sets the output of every query that sees a non-finite value to NaN (`cpu.py`).
  It must be an op: the C++ template does not compile if the graph computes with its output
  (`test_limit_flex_attention_on_cpu_does_not_compile_with_what_follows`).
- It does not compile in graphs of ten symbolic sizes or more: the C++ template mistakes the tenth
  symbol for the first one followed by a digit. Calls with documents, padding or mods are compiled
  for fixed sizes (`flex.py`; `test_masked_plan_on_cpu_at_a_second_size` in `tests/test_fuzz.py`).

Flash attention on CPU:

- It returns zeros for queries of NaN if there are fewer than 16 keys (pytorch/pytorch#141128,
  `test_limit_flash_attention_on_cpu_hides_nan_among_few_keys`), and multiplies masked values by
  zero. It gets finite inputs, and queries that see a non-finite value are computed apart
  (`cpu.py`).

Mask mods and block masks:

- A mask_mod that captures the result of `scatter` reads it as it was before the scatter, or does
  not compile (`test_limit_mask_mod_reads_what_a_scatter_has_not_yet_written`). Mask mods capture
  results of `topk` instead (`capturable` in `masks/tiles.py`).
- A mask_mod can capture symbolic lengths but no expressions of them: it captures each length by
  itself. And a length of one tile is specialized to 128 only after the mask_mod has captured its
  symbol, for which 2.11 generates code that does not compile: `settled` specializes it first
  (`masks/tiles.py`).
- FlexAttention on CUDA assumes that the lists of a BlockMask are contiguous. In a graph, inductor
  chooses their layout, and a view of one head has stride 0: one sequence then silently reads the
  lists of another. `_contiguous` makes all lists contiguous (`masks/tiles.py`;
  `test_lists_follow_each_other` in `tests/test_compile.py`).

torch.compile:

- Recompilations are counted per code object, whatever the options of the compilation. Each kind of
  call gets a code object of its own (`flex.py`).
- Backward overwrites saved tensors, so that it cannot run again with `retain_graph=True`. The
  backend `repeatable` keeps them (`flex.py`).
- Calls from several threads fail at random in 2.13: `fullgraph=True` counts graphs in a global
  (pytorch/pytorch#185138). Graph breaks are refused inside the function instead (`flex.py`).
- Inductor pads strides, and 2.11 then reads some tensors with the unpadded ones
  (pytorch/pytorch#194281). Padding is off (`flex.py`, `export.py`).
- `torch.compiler.is_exporting` is true in every compiled graph in 2.11
  (`test_compiled_graphs_are_not_taken_for_exported_ones`). Ours is false while Dynamo
  compiles (`masks/_torch/exporting.py`).
- 2.11 on CUDA does not compile a `clamp` of a range that becomes an index, a `searchsorted` in a
  view, or one for values that all lists share. `where`, copies and values of each list's own
  replace them (`layout.py`, `block_mask.py` and `tiles.py` in `masks/`).
- 2.11 on CUDA does not compile a scan over so many values that an index might need 64 bits, which
  it concludes from the bounds of lengths. In the counting sort a kernel sums the counts of each
  block, and `cumsum` only their totals (`masks/regroup_kernel.py`).

Export and packages:

- A Python custom op in a package would need Python. Graphs exported on CPU consist of PyTorch's
  own ops (`portable.py`, and the gate in `masks/router.py`).
- A package reads its inputs with the strides of the export's example. It is made for contiguous
  inputs, and `load` makes them contiguous (`test_inputs_lie_anywhere` in `tests/test_export.py`).
- A condition on lengths is decided for the example's length. Where that matters, we ask whether it
  holds at every length (`masks/_torch/exporting.py`). Sizes of 0 and 1 would be specialized:
  `backed_size_oblivious` prevents that, and an example of one block is traced as a longer one.
- Slices of a padded length keep an expression as their length, and each of these slows down the
  compiler from there on (`test_limit_slices_of_padded_lengths_stay_expressions`). Exported code
  takes rows by index, and reads the number of tiles from a tensor.
- `map` over a variable number of chunks does not compile
  (`test_limit_map_over_a_length_does_not_compile`). `while_loop` does (`masks/router.py`).
- `while_loop` fixes variable sizes to those of an earlier export: torch.export has torch.compile
  trace the loop, and comparing sizes with those of a cached graph makes them constants.
  `_forget_loops` clears these graphs before each export (`export.py`).
- Inductor omits a rounding to 16 bits whose result is widened again, but the gate's block keys
  need it: packages are compiled with `emulate_precision_casts`. 2.11 and 2.12 still omit it within
  sums: there the gate of a 16-bit package for CPU averages keys before they are rounded, and may
  choose another block where two are nearly as good.
- The C++ of a large graph may lack declarations before 2.13. `writers_told_apart` patches that
  (`export.py`).
- 2.11 miscompiles the exported gate of float64 inputs. Packages hold 16-bit or float32 attention
  (`plans.py`).

Gradients:

- `torch.func.grad` refuses an op with a gradient of its own, and forward-mode AD gives it tangents
  of zero (`test_limit_ops_do_not_know_torch_func`). Under `torch.func` an autograd.Function stands
  in for the op, and tangents are refused (`masks/_torch/gradients.py`, `masks/checks.py`).
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from moba_flex.compile.exporter import export, load

__all__ = ["export", "load"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'moba_flex.compile' has no attribute {name!r}")
    # Now and not before, since PyTorch's compiler takes longer to import than all else.
    from moba_flex.compile import exporter

    return getattr(exporter, name)
