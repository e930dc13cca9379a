"""What a command's end means to whoever started it: a shell, a launcher, a scheduler."""

PREEMPTED = 4  # told to leave, and saved: start again

BAD_INPUT = 2  # a person mends the input first
STOPPED = 3  # a person looks first; the run can be resumed
LOST = 5  # hung, or a rank or machine was lost: start again
UNFIT = 6  # a plan that does not fit the GPUs, or a rehearsal that found a fault
FINAL = (BAD_INPUT, STOPPED, PREEMPTED)  # starting again at once, on the same machines, would not help
