"""System calls, mounts, cgroups and seccomp filters."""
