-- Lines that were not stored because their device logs more than it may: counted here in the transaction of the batch they came
-- in, until a line says so.
create table log_suppressed (
    device_key bigint      primary key,
    since      timestamptz not null,
    lines      bigint      not null constraint log_suppressed_lines_check check (lines > 0)
);
-- Read and written by those who write lines.
revoke all on log_suppressed from muster_tenant;
