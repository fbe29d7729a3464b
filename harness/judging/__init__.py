"""Who is better: judges, their models, the evaluation of a policy, duels."""
