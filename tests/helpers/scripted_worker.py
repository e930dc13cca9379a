"""Worker process that does what the answer says: sleep, use memory, die, or grade. The pool must survive all of it."""

import json
import os
import sys
import time

if sys.argv[1:] == ["stillborn"]:
    sys.exit(3)
print("ready", flush=True)
for line in sys.stdin:
    kind, gold, text, finished, thinking_end = json.loads(line)
    order, _, value = text.partition(" ")
    if order == "sleep":
        time.sleep(float(value))
    elif order == "spin":
        sum(range(10**12))  # in C, holding the interpreter: no signal handler and no thread of this process would run
    elif order == "hog":
        hoard = bytearray(int(value) * 2**20)
    elif order == "die":
        os._exit(int(value or 1))
    elif order == "kill":
        os.kill(os.getpid(), 9)
    elif order == "half":
        sys.stdout.write('["corr')
        sys.stdout.flush()
        os._exit(0)
    print(json.dumps(["correct" if gold == text else "incorrect", "exact", text, 0.001]), flush=True)
