-- rise(model): lifts lanes whose oldest job has waited `aging_seconds` more. Claims do it too; sweeps keep the
-- order right for readers of positions while no node claims.
return rise(ARGV[2])
