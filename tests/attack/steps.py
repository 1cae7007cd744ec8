"""A program that does one operation on files after the other, and tells what came of each."""

import errno
import os
import sys

import faults

STEPS = {  # By the operation, whose name has a 64 with some C libraries.
    "2 mkdir /new": lambda: os.mkdir("new"),
    "2 open /new/file": lambda: os.dup2(os.open("new/file", os.O_RDWR | os.O_CREAT), 100),
    "8 write /new/file": lambda: os.write(100, b"1234"),
    "8 fsync /new/file": lambda: os.fsync(100),
    "2 rename /new/file": lambda: os.rename("new/file", "new/other"),
    "1 stat /new/other": lambda: os.stat("new/other").st_size,
    "4 pread /new/other": lambda: os.pread(100, 10, 0).decode(),
    "1 opendir /new": lambda: os.scandir("new"),
    "2 unlink /new/other": lambda: os.unlink(os.path.abspath("new/other")),
    "2 rmdir /new": lambda: os.rmdir("new"),
}


def main(directory):
    os.chdir(directory)
    for step in STEPS.values():
        try:
            came = step()
            print(came if isinstance(came, int | str) else "done", flush=True)
        except OSError as error:
            print(errno.errorcode[error.errno], flush=True)
    os.stat("/")  # Which is elsewhere.


if __name__ == "__main__":
    faults.meet(sys.argv[2])
    main(sys.argv[1])
