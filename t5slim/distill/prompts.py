"""temporary"""
from __future__ import annotations
import os, random
from collections.abc import Sequence
from typing import Any
from .checks import load_prompts, Prompts
PromptSource = Any
class _List:
    def __init__(self, prompts, seed):
        self._p=prompts; self._seed=seed; self._epoch=(-1,[])
    def prompt(self, i, seed=0, update=0):
        e,k=divmod(i,len(self._p))
        if self._epoch[0]!=e:
            self._epoch=(e, random.Random(f"{self._seed}/{e}").sample(self._p,len(self._p)))
        return self._epoch[1][k]
    def facts(self):
        from .records import fingerprint
        return fingerprint(self._p)
def prompt_source(prompts, name='prompts'):
    return _List(load_prompts(prompts,name), 0)
