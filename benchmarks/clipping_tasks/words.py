"""Text of the page, apart from its numbers."""

INTRODUCTION = """# Clippers on nine tasks

Made by `python benchmarks/clipping.py`, {runs} runs on the seeds {seeds}, Python {python}, torch
{torch}, on CPU; `--again` writes the page from the records. In full that takes a night on two busy cores, an hour or
two on free ones; `--sample` takes ten minutes for a part of it. This page is from {extent}.

Small models of the usual kinds, trained with and without each clipper, over a sweep of peak learning rates from below
the best one to some ten times too high. Weights, batches and accidents of a seed are the same for all arms. Clippers
have their published defaults; AGC leaves out the last layer, as its paper does; ZClip's defaults include a ceiling of
1.0. Nobody chose a rate for an arm: each is read at the rate that is best for it.

| task | steps | rates |
| --- | --- | --- |
{tasks}"""

BARE_NOTE = """In the regime `nan` the guard skips the steps that are not finite for **every** arm of the tables above,
so what they compare is the clipper: whether its statistics survive. The loop without a guard:"""

HOW = """## What is measured, and how far it goes

- **Losses** are on held-out data: nats for text and digits, absolute error for the two regressions, squared error for
  the noise of the diffusion model. A run that ends worse than it began, or not finite, counts with the loss before its
  first step.
- **Corrupt batches**, one in fifty, are, in equal numbers and at steps drawn at random: {corruptions}.
- **NaN**, at one step in fifty: one element of one gradient, tensor and step drawn at random. This regime is run at
  three rates around the best one.
- **Steps clipped**: share of the steps taken on which any gradient was scaled.
- **Intervals** are of Student's t over the differences between runs of one seed, in percent of the other arm's mean.
  "Within noise" means that the interval holds 0. The best rate of an arm is chosen on the same runs, which favours all
  arms alike.
- Runs are short, so differences of the first steps are seen in the final loss; AdaGC spends 100 steps in its warm-up.
  The long runs are there to see what is left of them.
- {ours}'s numbers (3 %, 2 %, 5 %, a fifth of the distance) were chosen on the seeds 100 to 102 of these tasks, among
  some forty forms. Then it was run on the seeds of this page. It was changed once after that, so that a first batch out
  of the ordinary and batches without a signal do less harm, which changed little here, and its runs were repeated.

What the forms that were tried have shown, on those seeds:

- **With Adam the scale of all gradients is free**, so a clipper may hold them anywhere below their usual size. The
  lower the level lies among the norms, the less single batches matter, which pays under heavy-tailed noise, outlying
  targets and at high rates. A level in the middle of the norms (rise 5 %) was 2 to 6 % worse on digits and outliers.
- **A soft start pays with Adam, and costs with SGD.** Large gradients of the first steps stay in Adam's second moments;
  with SGD a soft start is a lower learning rate.
- **With SGD one limit for all tensors is better** than one for each: 1.66 to 1.69 in place of 1.69 to 1.74 under
  heavy-tailed noise. Each tensor by itself bends the direction of the step.
- **With SGD a level low among the norms slows learning** at rates below the best one. In the middle of them it does
  not.
- What did not help: a level that never rises (digits with SGD), a wide margin above the level (heavy tails), limits by
  weight norm as in AGC where batches are corrupt."""
