"""The command line of train_loop.py: `python train_loop.py` runs this file.

Test: pytest tests/test_train_loop.py.
"""

from harness.runs import exits

exits.before(__name__)  # Ctrl-C is one line while libraries load, too

import train_loop

if __name__ == "__main__":
    exits.run(train_loop.main)
