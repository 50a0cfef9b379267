"""Faults of the one way to write: what is there before, what the dead have left, links, and the order of flushes."""

from __future__ import annotations

from scripts.mutants.fault import Fault

_STAGING_TESTS = "tests/formats/test_staging.py::"
_POWER = "tests/formats/test_power_cuts.py::"
_WRITING = "tests/formats/test_writing.py::"
_STAGING = "kt_sft/formats/staging.py"
_OVERWRITING = "kt_sft/formats/overwriting.py"
_SAVING = "kt_sft/integrations/llamafactory/saving.py"

FAULTS = (
    Fault(
        "a file gets its name before it is flushed",
        _STAGING,
        "            yield stream\n            flush_file(stream)\n        os.replace(staged, target)",
        "            yield stream\n        os.replace(staged, target)",
        (f"{_POWER}test_names_come_after_data_and_are_flushed",),
    ),
    Fault(
        "the folder of a new name is not flushed",
        _STAGING,
        "place / _REPLACED, replaces=replaces)\n            sync_folder(target.parent)",
        "place / _REPLACED, replaces=replaces)",
        (f"{_POWER}test_names_come_after_data_and_are_flushed",),
    ),
    Fault(
        "files of an adapter are not flushed",
        _OVERWRITING,
        "            disk.flush(fresh)\n",
        "",
        (f"{_POWER}test_names_come_after_data_and_are_flushed",),
    ),
    Fault(
        "a link in staging is followed",
        _STAGING,
        "os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC",
        "os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC",
        ("tests/formats/test_safetensors_index.py::test_writer_leaves_what_is_there",),
    ),
    Fault(
        "staging of a living writer is removed",
        _STAGING,
        "if _lock(lock) is not True or",
        "if",
        (f"{_STAGING_TESTS}test_what_the_dead_have_left_is_removed_and_nothing_else",),
    ),
    Fault(
        "staging of another user is removed",
        _STAGING,
        " or found.st_uid != os.geteuid():",
        ":",
        (f"{_STAGING_TESTS}test_leftovers_of_another_user_are_left_alone",),
    ),
    Fault(
        "a planted record names a folder elsewhere",
        _STAGING,
        "name == os.path.basename(name) and ",
        "",
        (f"{_STAGING_TESTS}test_a_planted_record_leads_nowhere",),
    ),
    Fault(
        "a config is there before its weights",
        _OVERWRITING,
        "    for path in sorted(together, key=staging.is_entry):",
        "    for path in sorted(together, key=lambda path: not staging.is_entry(path)):",
        (f"{_STAGING_TESTS}test_an_adapter_that_is_half_renamed_is_finished_and_cannot_be_read_until_then",),
    ),
    Fault(
        "weights and config change one after the other",
        _OVERWRITING,
        "    if is_held and len(together) + len(dropped) > 1 and _exchanged(",
        "    if False and _exchanged(",
        (f"{_STAGING_TESTS}test_files_that_belong_together_change_in_one_step_and_others_stay",),
    ),
    Fault(
        "what comes into a folder while it is exchanged is lost",
        _OVERWRITING,
        "        _bring_along(linked, folder, left_out)\n    return True",
        "    return True",
        (f"{_STAGING_TESTS}test_what_others_put_into_the_folder_meanwhile_is_kept",),
    ),
    Fault(
        "a folder in which a process works is exchanged",
        _OVERWRITING,
        " or _holds_working_directory(folder)",
        "",
        (f"{_STAGING_TESTS}test_a_process_keeps_its_working_directory",),
    ),
    Fault(
        "private files of a library stay private",
        _OVERWRITING,
        "            disk.share(fresh)\n",
        "",
        (f"{_POWER}test_names_come_after_data_and_are_flushed",),
    ),
    Fault(
        "a link in the place of a run's staging is followed",
        _SAVING,
        "        staging.unlink(missing_ok=True)\n",
        "        pass\n",
        (f"{_WRITING}test_links_in_a_runs_folder_lead_nowhere",),
    ),
    Fault(
        "a bar counts what was done twice",
        "kt_sft/progress.py",
        "bar.update(done - bar.n)",
        "bar.update(done)",
        ("tests/unit/test_progress.py::test_a_bar_counts_what_is_done",),
    ),
)
