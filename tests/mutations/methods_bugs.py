"""The bugs that methods.py seeds into the methods against forgetting, and into what goes from task to task."""

from dataclasses import dataclass

EWC, FISHER, REPLAY, L2 = (f"methods/test_{name}.py" for name in ("ewc", "fisher", "replay", "l2"))
DISTILL, DOMAIN, FREEZE = (f"methods/test_{name}.py" for name in ("distill", "domain", "freeze"))
PROGRESSIVE, TASKS, BASE = (f"methods/test_{name}.py" for name in ("progressive", "multitask", "base_task"))
GENERAL, OWN_WORDS, RESUME = "methods/test_general.py", "methods/test_own_words.py", "finetune/test_resume.py"
FOLDER, END = "finetune/test_folder.py", "finetune/test_end.py"
PAST, TOGETHER = "finetune/test_past.py", "methods/test_together.py"


@dataclass(frozen=True)
class Bug:
    kind: str  # of method
    name: str
    file: str
    right: str  # stands once in the file
    wrong: str
    tests: str  # the file in tests/ that must see it
    which: str  # of its tests, as pytest -k has it


def of_ewc(name: str, right: str, wrong: str, which: str, tests: str = EWC) -> Bug:
    return Bug("ewc", name, "methods/ewc.py", right, wrong, tests, which)


def of_fisher(name: str, right: str, wrong: str, which: str, tests: str = FISHER) -> Bug:
    return Bug("fisher", name, "methods/fisher.py", right, wrong, tests, which)


def of_per_example(name: str, right: str, wrong: str, which: str) -> Bug:
    return Bug("fisher", name, "methods/per_example.py", right, wrong, FISHER, which)


def of_replay(name: str, right: str, wrong: str, which: str) -> Bug:
    return Bug("replay", name, "methods/replay.py", right, wrong, REPLAY, which)


def of_l2(name: str, right: str, wrong: str, which: str) -> Bug:
    return Bug("l2", name, "methods/l2.py", right, wrong, L2, which)


def of_past(name: str, right: str, wrong: str, which: str, tests: str = PAST, file: str = "past") -> Bug:
    return Bug("past", name, f"finetune/{file}.py", right, wrong, tests, which)


def of_own_words(name: str, right: str, wrong: str, which: str, tests: str = OWN_WORDS) -> Bug:
    return Bug("general", name, "methods/own_words.py", right, wrong, tests, which)


BUGS = [
    of_own_words("the question is learnt too", "[IGNORED] * before + ids[before:]", "list(ids)", "answers"),
    of_own_words("an answer that goes on is ended", "(behind if len(answer) < room else [])", "behind", "no_end"),
    of_own_words(
        "questions run into the template", "split(end, 1)[0] if end else text", "strip()", "ends_the_question"
    ),
    of_own_words("no room is no reason", "room >= LEAST", "room >= 0", "without_room"),
    of_own_words("no question is one", "for text in questions if text]", "for text in questions]", "asks_nothing"),
    of_own_words("new tokens in the text", "*range(known, _vocabulary(model))", "", "just_added", GENERAL),
    Bug(
        "general",
        "new tokens are known",
        "methods/general.py",
        "self._known = known_tokens(model)",
        "self._known = 1 << 20",
        GENERAL,
        "just_added",
    ),
    Bug(
        "distillation",
        "the base in the dtype that it is stored in",
        "methods/distill.py",
        "weight.data.float() if weight.requires_grad else weight.data",
        "weight.data",
        DISTILL,
        "stored_in_bf16",
    ),
    Bug(
        "distillation",
        "any base on resume",
        "methods/distill.py",
        'if state.get("base") != self._digest:',
        'if "base" not in state:',
        DISTILL,
        "another_base",
    ),
    of_past(
        "someone's folder resumed",
        "if held and not self._is_marked():",
        "if held and overwrite and not self._is_marked():",
        "is_spared",
        FOLDER,
        file="folder",
    ),
    of_past("unfinished run gone on from", 'not (folder / "results.json").exists()', "False", "killed_while", END),
    of_past("adapter beside any base", "base and past.base and base != past.base", "False", "another_base", END),
    Bug(
        "domain",
        "number of texts as sampled",
        "methods/domain.py",
        "self._general = run.sources.get(SOURCE, ())",
        "self._general = list(run.sources.get(SOURCE, ()))",
        DOMAIN,
        "of_a_checkpoint",
    ),
    of_ewc("weights under the names of wrapped heads", "with heads_aside(run.model):", "if True:", "own_output", TASKS),
    of_past(
        "any frozen base on resume",
        ' or values["base"] != self._base:',
        ":",
        "another_frozen_base",
        RESUME,
        file="tuner",
    ),
    of_ewc(
        "penalty without its strength", "            strength,\n        )", "            1.0,\n        )", "penalty"
    ),
    of_ewc("half of the value missing", "strength / 2 * self.constant", "self.constant / 2", "folds"),
    of_ewc("anchor of the newest task alone", "torch.lerp(before, anchor, share)", "anchor", "folds"),
    of_ewc("share of the wrong task", "added / total, 1.0", "known / total, 1.0", "folds"),
    of_ewc("constant of folded tasks dropped", "self.constant += float(", "self.constant = 0 * float(", "folds"),
    of_ewc("decay ignored", "known * decay + fisher", "known + fisher", "decay"),
    of_ewc("new task fades instead of the past", "known * decay + fisher", "known + decay * fisher", "decay"),
    of_ewc(
        "oldest anchor kept",
        "self.anchors[name] = anchors[name].detach().clone(",
        "self.anchors.setdefault(name, anchors[name]).clone(",
        "decay",
    ),
    of_ewc("frozen weights pulled too", " and weight.requires_grad]\n        value", "]\n        value", "penalty"),
    of_ewc("anchors not restored", 'part("anchor/"), state', 'part("fisher/"), state', "first_task"),
    of_ewc(
        "base model counted in each task",
        "if not self.past_tasks.fishers and run.general",
        "if run.general",
        "first_task",
    ),
    of_ewc(
        "Fisher information of the general data, not of the task",
        'self._params, run.sources["train"]',
        "self._params, run.general",
        "first_task",
    ),
    of_fisher("not divided by tokens", "total /= max(tokens, 1)", "total /= 1", "softmax"),
    of_fisher(
        "divided by examples", "tokens += len(labels)", "tokens += len(next(iter(batch.values())))", "equals and tied"
    ),
    of_fisher("labels of the data for the true one", "None if empirical else generator", "None", "softmax or seed"),
    of_fisher("drawn labels for the empirical one", "None if empirical else generator", "generator", "empirical"),
    of_fisher(
        "logits summed in half precision",
        "logits.sum(dtype=torch.promote_types(logits.dtype, torch.float32))",
        "logits.sum()",
        "half_precision",
    ),
    of_per_example("tied weight of one target as if untied", " and name not in self._ids:", ":", "one_target"),
    of_per_example("rows that are looked up count twice", "total[rows] = before", "pass", "equals and tied"),
    of_per_example(
        "rows that are looked up without the head's gradient",
        "gradient += torch.cat(self._kept.pop(name))",
        "self._kept.pop(name)",
        "equals and tied",
    ),
    of_per_example(
        "chunks of rows in the wrong order",
        "zip(torch.split(total, rows)",
        "zip(reversed(torch.split(total, rows))",
        "equals",
    ),
    of_ewc(
        "batches of any length",
        'min(most_rows, most_tokens // len(examples[start]["input_ids"]))',
        "most_rows",
        "no_more",
    ),
    of_replay("buffer keeps the first", "draw.randrange(self.offered + 1)", "self.size", "uniform"),
    of_replay(
        "buffer forgets what earlier tasks offered",
        "draw.randrange(self.offered + 1)",
        "draw.randrange(index + 1)",
        "uniform",
    ),
    of_replay(
        "count of offered examples not carried", 'self.offered = state["offered"]', "self.offered = 0", "uniform"
    ),
    of_replay("share rounded down", "n * self.frequency + Fraction(1, 2)", "n * self.frequency", "exact"),
    of_replay(
        "share of the others' number",
        "len(others) / (1 - self.frequency)",
        "len(others) * (1 + self.frequency)",
        "exact",
    ),
    of_replay("share starts anew in each epoch", "others, epoch * length, length", "others, 0, length", "exact"),
    of_replay("one order for all turns", "/replay/{turn}", "/replay", "turns"),
    of_replay(
        "running task draws from the new buffer", "kept = list(self.examples)", "kept = self.examples", "running"
    ),
    of_l2(
        "anchors follow the weights",
        "name: weight.detach().clone(memory_format=torch.contiguous_format) for",
        "name: weight.detach() for",
        "drift_of_the_weights",
    ),
    of_l2("wrong sign of the drift", "torch.cat([B - B0, B0], 1)", "torch.cat([B + B0, B0], 1)", "effective"),
    of_l2("scaling not squared", "self.strength * scaling**2", "self.strength * scaling", "effective"),
    of_l2("gradient up the hill", "add_(gradient, alpha=strength)", "add_(gradient, alpha=-strength)", "small"),
    of_l2(
        "frozen weights pulled too",
        "in self._weights.items() if weight.requires_grad}",
        "in self._weights.items()}",
        "for_now",
    ),
    Bug(
        "distillation",
        "against the tuned self, adapters",
        "methods/distill.py",
        "lambda: adapters_disabled(model)",
        "nullcontext",
        DISTILL,
        "mean_divergence",
    ),
    Bug(
        "distillation",
        "against the tuned self, all weights",
        "methods/distill.py",
        "LanguageHead(_frozen_copy(model))",
        "LanguageHead(model)",
        DISTILL,
        "mean_divergence",
    ),
    Bug(
        "distillation",
        "mean over the batch, not the step",
        "methods/distill.py",
        ") / total",
        ") / part.targets",
        DISTILL,
        "mean_divergence",
    ),
    Bug(
        "domain",
        "shares swapped",
        "methods/domain.py",
        "int(n * self.weight",
        "int(n * (1 - self.weight)",
        DOMAIN,
        "exact",
    ),
    Bug(
        "domain",
        "shares start anew in each epoch",
        "methods/domain.py",
        "domain, epoch * length, length",
        "domain, 0, length",
        DOMAIN,
        "exact or all_come",
    ),
    Bug(
        "freezing",
        "one block too few",
        "methods/freeze.py",
        "stack[: self.layers]",
        "stack[1 : self.layers]",
        FREEZE,
        "lowest",
    ),
    Bug(
        "freezing",
        "a block too many thaws",
        "methods/progressive.py",
        "len(self._blocks) - count]",
        "len(self._blocks) - count - 1]",
        PROGRESSIVE,
        "unfreezing",
    ),
    Bug(
        "freezing",
        "what others froze thaws",
        "methods/progressive.py",
        "for weight in model.parameters() if weight.requires_grad]",
        "for weight in model.parameters()]",
        PROGRESSIVE,
        "stays_frozen",
    ),
    Bug(
        "multi-task",
        "weight ignored",
        "methods/multitask.py",
        "return weight * self._head",
        "return self._head",
        TASKS,
        "weighted_sum",
    ),
    Bug(
        "multi-task",
        "head of the task before",
        "methods/multitask.py",
        "            self._switch(None)\n",
        "            pass\n",
        TASKS,
        "gradient_from_other or judged",
    ),
    Bug(
        "base task",
        "wrong sign of forgetting",
        "methods/base_task.py",
        "self._after - self._before",
        "self._before - self._after",
        BASE,
        "before_and_after",
    ),
    of_past("last task not counted", '{"tasks": self.tasks, ', '{"tasks": self.tasks[:-1], ', "folder_of_the_first"),
    of_past(
        "methods' tensors dropped on save",
        'Checkpoint({"methods": tensors}',
        'Checkpoint({"methods": {}}',
        "folder_of_the_first",
    ),
    of_past("damage unseen", "find_fault(path) if path.is_dir()", "None if path.is_dir()", "refused_by_name"),
    of_past("weights not taken over", "model.load_state_dict(state)", "pass", "folder_of_the_first"),
    of_past(
        "adapter loaded twice",
        "for path in adapters if not list_adapters(model) else []",
        "for path in adapters",
        "has_already",
    ),
    of_past("heads left behind", 'if (folder / "heads").is_dir():', "if False:", "heads_and_adapters", TOGETHER),
    of_past(
        "Fisher information of the last task dropped",
        "self._past.methods | known,",
        "self._past.methods,",
        "folder_of_the_first",
        file="tuner",
    ),
    of_past(
        "task counted twice",
        "            self._task_ended = True\n            return",
        "            return",
        "can_be_gone_on",
        file="tuner",
    ),
]
