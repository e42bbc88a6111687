"Functions of self-test parts, which tests run in child processes."

import os
import signal
import subprocess
import sys


def works():
    return dict(samples_per_second=12.345678, note='a|b')


def fails():
    print('the log of a failure, with https://ada:secret@example.org')
    raise AssertionError('the losses differ by 3e-01')


def crashes():
    os.kill(os.getpid(), signal.SIGSEGV)


def hangs():
    "Starts a process of its own, writes down its number, and waits with it."
    child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])
    with open(os.environ['CHILD_FILE'], 'w', encoding='utf-8') as file:
        file.write(str(child.pid))
    child.wait()
