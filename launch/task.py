"""A rank under srun: `python -m launch.task train …` is `tubeworks train …`, with signals held back at once.

Before the training listens, SIGUSR2 would end a process that is still importing, and with it the job. Here
the signals wait, from the first line on, for the thread that takes them (`framework.training.signals`).
"""

import signal

signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGINT, signal.SIGTERM, signal.SIGUSR2))

from launch.cli import main  # noqa: E402

if __name__ == "__main__":
    main()
