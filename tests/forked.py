"""Processes of :mod:`nnunet_deform.processes.isolation` that need not import torch first."""

import faulthandler
import os

from nnunet_deform.processes import isolation


class Forked:
    """In the place of ``subprocess.Popen``: a fork of this process, with all that a test has changed in it."""

    started = 0

    def __init__(self, command, stdout, **options):
        Forked.started += 1
        self.pid = os.fork()
        if self.pid == 0:
            faulthandler.disable()
            os.setsid()
            os.dup2(stdout.fileno(), 1)
            os.dup2(stdout.fileno(), 2)
            try:
                isolation._serve(command[-1])
            finally:
                os._exit(0)
        self.code = None

    def poll(self):
        if self.code is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self.code = os.waitstatus_to_exitcode(status) if pid else None
        return self.code

    def wait(self, timeout):
        self.code = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
