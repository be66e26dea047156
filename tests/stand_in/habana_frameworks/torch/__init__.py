"""What of Gaudi's plug-in for torch a program sees: torch.hpu, the device "hpu", `core.mark_step`.

It computes on the CPU, and it is no proof that a program runs on Gaudi. What it does is to note the
order of a program's calls, and to refuse what Gaudi refuses or does wrong without a word:

- an optimizer made of a model that is moved to hpu afterwards;
- in lazy mode: no mark_step between backward and the optimizer's step, after the optimizer's
  step, or after a batch of an evaluation;
- PT_HPU_LAZY_MODE changed after the import;
- torch's inference mode; tensors of two devices in one operation; an hpu tensor as an array.

STAND_IN_HPU=absent is a host without a Gaudi, STAND_IN_HPU=busy one whose Gaudi is another's.
"""

from habana_frameworks.torch import core

__all__ = ["core"]
