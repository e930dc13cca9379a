"""Pure torch: selection, advantages, packing, token weights, losses, guard, logprob parity, schedules."""
