"""The one loop. Recipes differ only in their students, their teachers and the coefficients of the loss."""

from contextlib import ExitStack

from engine.config.settings import Config
from engine.run.build import build_run
from engine.run.check_settings import check
from engine.students.gradients import accumulate
from engine.system.distributed import init_distributed
from engine.system.signals import StopSignal


def train(config: Config) -> None:
    """Trains the students of `config`, or goes on where the run of that name stopped.

    Raises UserError for a user's mistake, if possible before anything is written.
    """
    runtime = init_distributed()
    check(config)
    stop = StopSignal()
    with ExitStack() as stack:
        run = build_run(config, runtime, stack)
        cohort, teachers, outer_loop = run.cohort, run.teachers, run.outer_loop
        coefficients = outer_loop.coefficients()
        for step in run.steps():
            outer_loop.before_step(step, cohort)
            tally = accumulate(cohort, step, coefficients, teachers)
            # All students step, or none where anything is NaN. Every step waits for the device here; those that are
            # recorded, or after which ω is learnt, wait once more below.
            verdict = cohort.update(tally.losses_S, tally.ce_S, run.learning_rates(step), stop=bool(stop))
            coefficients = outer_loop.after_step(step, cohort, coefficients, verdict)
            run.after_step(step, tally, verdict)  # It records the step, and evaluates and saves where that is due.
            if verdict.stop:
                run.stop()
                return
        run.finish()
