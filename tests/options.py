"""What an option of `conf/` needs beside the defaults to compose: the trained toy has no weights for actions."""

ACTION_TASKS = ("policy", "forward_dynamics", "inverse_dynamics")
TASK_NEEDS = {task: ["model=toy_random"] for task in ACTION_TASKS}
