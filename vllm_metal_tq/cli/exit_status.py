"""The exit statuses of the command, in one place for its help, its documentation and its tests."""

from __future__ import annotations

DONE = 0
WRONG = 1
BAD_INPUT = 2
UNEXPECTED = 70  # EX_SOFTWARE of sysexits.h
INTERRUPTED = 130  # 128 and the number of SIGINT, as shells have it
CLOSED_PIPE = 141  # likewise SIGPIPE

MEANINGS = {
    DONE: "all went well",
    WRONG: "doctor found a kernel that is wrong",
    BAD_INPUT: "bad input: one line on standard error says what is allowed",
    UNEXPECTED: "an unexpected error: --debug shows where",
    INTERRUPTED: "interrupted",
    CLOSED_PIPE: "what read the output has closed it",
}
