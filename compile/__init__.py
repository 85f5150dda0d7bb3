"""The execution plans of MoBA attention, and their export into packages.

Limits of PyTorch 2.11 to 2.13 that were met here, and what is done about each.
`tests/test_graphs.py` pins those marked with its test's name, `test_limit_...`: if PyTorch lifts
one, that test fails and the detour can go.

- FlexAttention on CPU returns no log-sum-exp (`..._has_no_lse`) and has no backward
  (`..._has_no_backward`). The plan "routed" runs flash attention there, part by part (`cpu.py`).
- A mask_mod that captures what `scatter` wrote reads it as it was before, or does not compile
  (`..._scatter_has_not_yet_written`): what is captured is a result of `topk`.
- FlexAttention on CPU wants lists of tiles at full width (`..._have_full_width_on_cpu`).
- FlexAttention captures symbols of lengths but no expressions of them, and pins a length of one
  tile too late (`masks/tiles.py`, `settled`).
- Code compiled in one place counts towards one limit of recompilations, whatever its options, and
  a kept graph overwrites saved tensors (`flex.py`).
- 2.13 counts the graphs of `fullgraph=True` in a global, so that calls in several threads fail at
  random (pytorch/pytorch#185138): graph breaks are refused inside the function (`flex.py`).
- `x.contiguous()` in a graph is laid out as the compiler likes, and FlexAttention on CPU reads it
  as contiguous (`..._reads_a_copy_as_contiguous`): strides are asked for (`masks/inputs.py`). Nor
  does it know where in its memory a view begins (`..._forgets_where_a_view_begins`): there it gets
  copies.
- FlexAttention on CPU gives zeros for rows of NaN (`..._hides_nan`), multiplies what it masks by
  zero, and does not compile with operations on its output (`..._with_what_follows`): an op looks
  for what is not finite, and makes whole rows NaN that see it (`cpu.py`).
- Flash attention on CPU gives zeros for rows of NaN if there are fewer than 16 keys
  (pytorch/pytorch#141128, `..._hides_nan_among_few_keys`), and multiplies what it masks by zero:
  it is given finite numbers, and rows that see others are computed apart (`cpu.py`).
- FlexAttention on CUDA takes the lists of a BlockMask to lie one after the other, but a compiler
  may lay out what it computes in any order, and a view of one head has stride 0: sequences of a
  batch would take other sequences' lists, silently (`test_lists_follow_each_other`,
  `tests/test_compile.py`). All lists go through `_contiguous` (`masks/tiles.py`).
- Inductor leaves out a rounding to 16 bits that is followed by a widening, which the gate's block
  keys need: packages are compiled with `emulate_precision_casts`. In sums 2.11 and 2.12 leave it
  out all the same: there the gate of a 16-bit package for CPU averages keys before they are
  rounded, and may choose another block where two are nearly as good.
- The C++ template of FlexAttention takes the tenth symbol of a graph for the first and a digit:
  calls with documents, padding or mods are compiled for their sizes on CPU
  (`test_masked_plan_on_cpu_at_a_second_size`, `tests/test_fuzz.py`).
- In 2.11 `torch.compiler.is_exporting` says yes in every compiled graph
  (`test_compiled_graphs_are_not_taken_for_exported_ones`): `masks/exporting.py` asks further.
- 2.11 for CUDA compiles no `clamp` of a range that becomes an index, no search of a view, and no
  search for values that all lists share (`masks/layout.py`, `block_mask.py`, `tiles.py`).
- 2.11 for CUDA compiles no scan of so many values that their numbers might take 64 bits, which it
  concludes from the bounds of lengths: a kernel of the counting sort sums counts, PyTorch their
  totals (`masks/regroup_kernel.py`).
- Before 2.13 the C++ of a large graph may lack declarations (`writers_told_apart`, `export.py`).
- Padded strides are read with the old ones in 2.11 (pytorch/pytorch#194281): padding is off.
- A Python custom op runs in a package only where Python is: an exported graph on CPU is made of
  PyTorch's own ops (`attend_portable` in `cpu.py`, and the gate in `masks/router.py`).
- An op with a gradient of its own is refused by `torch.func.grad`, and gives tangents of zero
  (`..._ops_do_not_know_torch_func`): there autograd.Functions stand for ops, and tangents are
  refused (`masks/gradients.py`, `masks/checks.py`).
- A package reads its inputs as those of the export lay, whatever they are: it is made for
  contiguous ones, and `load` makes them so (`test_inputs_lie_anywhere`, `tests/test_export.py`).
- Export decides conditions on lengths for the example's: those that matter ask for every length
  (`masks/exporting.py`), sizes of 0 and 1 are no special case (`backed_size_oblivious`), and an
  example of one block is traced as a longer one.
- Lengths that are slices of padded ones stay expressions, each of which slows down the compiler in
  all that follows (`..._stay_expressions`): exported code takes rows by index, and the number of
  tiles is read from a tensor.
- torch.export has torch.compile trace a `while_loop`, which asks the sizes of one export whether
  they are those of an earlier one, and so pins them: loops are forgotten before each export
  (`_forget_loops`, `export.py`).
- `map` over a number of chunks that varies does not compile (`..._map_over_a_length_...`):
  `while_loop` does.
- 2.11 miscompiles the exported gate of float64 inputs: packages hold 16-bit or float32 attention.
"""

from moba_flex.compile.export import export, load

__all__ = ["export", "load"]
