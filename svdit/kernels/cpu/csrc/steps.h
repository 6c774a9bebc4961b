/* Several kernels in one call: after each of them hardly any of Python's code is left in cache. */

int EXPORT(linear)(const Rows *r, const Product *p)
{
    return JOIN(quantize_rows, ISA)(r) || JOIN(multiply, ISA)(p);
}

/* The steps in order; returns 0, or which one could not allocate its buffers, counted from 1. */
int EXPORT(run)(const Step *steps, int64_t count)
{
    for (int64_t i = 0; i < count; i++) {
        const Step *s = steps + i;
        if (s->kind == LINEAR ? JOIN(linear, ISA)(s->first, s->second) : JOIN(attend, ISA)(s->first)) return (int)i + 1;
    }
    return 0;
}
