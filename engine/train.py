"""The one loop. Pretraining, distillation and mutual learning differ in streams and coefficients alone."""

from contextlib import ExitStack

from engine.config.settings import Config
from engine.run.build import build_run
from engine.run.checks import check
from engine.students.gradients import accumulate
from engine.system.distributed import init_distributed
from engine.system.signals import StopSignal


def train(config: Config) -> None:
    """Trains the students of `config`, or goes on where the run of that name stopped.

    Raises UserError for whatever a user can mend, before anything is written where that can be known before.
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
            verdict = cohort.update(tally.losses_S, tally.ce_S, run.learning_rates(step), stop=bool(stop))
            coefficients = outer_loop.after_step(step, cohort, coefficients, verdict)
            run.record(step, tally, verdict)  # It writes the step down, and evaluates and saves where that is due.
            if verdict.stop:
                run.pause()
                return
        run.finish()
