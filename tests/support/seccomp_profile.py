"""A program: apply a container engine's seccomp profile to this process, then become a command.

Arguments: the profile's JSON, then the command. It runs where nothing but Python and libseccomp is installed.
"""

import ctypes
import json
import os
import sys

ACTIONS = {"SCMP_ACT_ALLOW": 0x7FFF0000, "SCMP_ACT_ERRNO": 0x00050000}
COMPARISONS = {"SCMP_CMP_EQ": 4}


class Argument(ctypes.Structure):
    """``struct scmp_arg_cmp`` of libseccomp."""

    _fields_ = (
        ("index", ctypes.c_uint),
        ("op", ctypes.c_int),
        ("value", ctypes.c_uint64),
        ("value_two", ctypes.c_uint64),
    )


def apply(profile: dict) -> None:
    library = ctypes.CDLL("libseccomp.so.2")
    library.seccomp_init.restype = ctypes.c_void_p
    context = ctypes.c_void_p(library.seccomp_init(ACTIONS[profile["defaultAction"]] | profile["defaultErrnoRet"]))
    for rule in profile["syscalls"]:
        action = ACTIONS[rule["action"]]
        if rule["action"] == "SCMP_ACT_ERRNO":
            action |= rule["errnoRet"]
        given = [(each["index"], COMPARISONS[each["op"]], each["value"], 0) for each in rule.get("args", [])]
        arguments = (Argument * max(1, len(given)))(*given)
        for name in rule["names"]:
            number = library.seccomp_syscall_resolve_name(name.encode())
            if number < 0:  # newer than the library, as an engine would skip it, or of the other architecture
                continue
            assert library.seccomp_rule_add_array(context, action, number, len(given), arguments) == 0, name
    assert library.seccomp_load(context) == 0


if __name__ == "__main__":
    apply(json.loads(sys.argv[1]))
    os.execv(sys.argv[2], sys.argv[2:])
